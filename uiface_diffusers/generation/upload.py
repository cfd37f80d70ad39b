"""A finished data set on the Hub."""

from pathlib import Path

from huggingface_hub import create_repo, upload_folder


def upload_dataset(output: Path, repo_id: str) -> str:
    """Uploads a finished data set to the Hub; returns its address."""
    repo_id = create_repo(repo_id, repo_type="dataset", exist_ok=True).repo_id
    commit = upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=output,
        commit_message="Upload synthetic faces",
        ignore_patterns=["*.part", "*.lock"],
    )
    return str(commit)
