"""The stand-in Hub against the real client."""

import json
import random
import subprocess
import sys
from textwrap import dedent

import pytest
from hub_server import HubServer

PRELUDE = """
import json
from pathlib import Path
import pytest
from huggingface_hub import HfApi, HfFileSystem, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
api, repo, answer = HfApi(), "tester/model", None
"""


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Runs a script in a new process beside the folder `model`, gives back what it leaves in `answer`."""
    weights = random.Random(0).randbytes(300_000)
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "unet" / "model.safetensors").write_bytes(weights)

    def run(script: str, **variables: str):
        script = PRELUDE + dedent(script) + "\nPath('answer.json').write_text(json.dumps(answer))"
        variables = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"} | variables
        process = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60
        )
        assert process.returncode == 0, process.stderr
        return json.loads((tmp_path / "answer.json").read_text())

    return run


def test_repositories_of_a_user(hub, client):
    client("""
        assert api.whoami()["name"] == "tester"
        assert api.create_repo("model").repo_id == repo
        assert api.create_repo(repo, exist_ok=True).repo_id == repo
        with pytest.raises(HfHubHTTPError, match="already created"):
            api.create_repo(repo)
        with pytest.raises(HfHubHTTPError, match="namespace 'someone'"):
            api.create_repo("someone/model")
        api.create_repo("tester/secret", private=True)
        api.create_repo("tester/short-lived")
        api.delete_repo("tester/short-lived")
        api.delete_repo("tester/short-lived", missing_ok=True)
        stranger = HfApi(token="hf_wrong")
        for call in (stranger.whoami, lambda: stranger.create_repo("other"), lambda: stranger.model_info(repo)):
            with pytest.raises(HfHubHTTPError, match="Invalid"):
                call()
    """)
    assert {key: repository.private for key, repository in hub.repositories.items()} == {
        "tester/model": False,
        "tester/secret": True,
    }


def test_uploads_a_folder_and_reads_it_back(hub, client, tmp_path):
    commit = client("""
        api.create_repo(repo)
        answer = api.upload_folder(repo_id=repo, folder_path="model").oid
        info = api.model_info(repo, files_metadata=True)
        assert info.sha == answer and not info.private and not info.gated
        files = {file.rfilename: file for file in info.siblings}
        assert list(files) == api.list_repo_files(repo) == [".gitattributes", "config.json", "unet/model.safetensors"]
        assert files["config.json"].size == 2 and files["config.json"].lfs is None
        assert files["unet/model.safetensors"].lfs.size == 300_000
        assert [entry.path for entry in api.list_repo_tree(repo)] == [".gitattributes", "config.json", "unet"]
        assert [entry.path for entry in api.list_repo_tree(repo, "unet")] == ["unet/model.safetensors"]
        assert [entry.path for entry in api.get_paths_info(repo, ["unet", "none"])] == ["unet"]
        for name in ("config.json", "unet/model.safetensors"):
            assert Path(hf_hub_download(repo, name)).read_bytes() == Path("model", name).read_bytes()
        with HfFileSystem().open(f"{repo}/unet/model.safetensors", block_size=1000) as file:
            file.seek(150_000)
            assert file.read(10) == Path("model/unet/model.safetensors").read_bytes()[150_000:150_010]
    """)
    assert hub.files("tester/model") == [".gitattributes", "config.json", "unet/model.safetensors"]
    assert hub.files("tester/model", commit) == hub.files("tester/model")
    for name in ("config.json", "unet/model.safetensors"):
        assert hub.read("tester/model", name) == (tmp_path / "model" / name).read_bytes()
    # only the large file is sent by itself
    assert [method for method, _ in hub.requests].count("PUT") == 1
    assert ("POST", "/api/models/tester/model/commit/main") in hub.requests


def test_history_and_branches(hub, client):
    first, second, on_branch = client("""
        api.create_repo(repo)
        first = api.upload_folder(repo_id=repo, folder_path="model").oid
        api.create_branch(repo, branch="old/one")
        with pytest.raises(HfHubHTTPError, match="already exists"):
            api.create_branch(repo, branch="old/one")
        config = dict(repo_id=repo, path_in_repo="config.json")
        second = api.upload_file(path_or_fileobj=b"new", **config).oid
        # the client makes no commit without a change
        assert api.upload_file(path_or_fileobj=b"new", **config).oid == second
        on_branch = api.upload_file(path_or_fileobj=b"branch", revision="old/one", **config).oid
        api.create_branch(repo, branch="first", revision=first)

        for revision, content in {None: "new", "main": "new", first: "{}", "old/one": "branch", "first": "{}"}.items():
            assert Path(hf_hub_download(repo, "config.json", revision=revision)).read_text() == content
        assert api.model_info(repo, revision="old/one").sha == on_branch
        branches = {branch.name: branch.target_commit for branch in api.list_repo_refs(repo).branches}
        assert branches == {"main": second, "old/one": on_branch, "first": first}
        commits = api.list_repo_commits(repo)
        assert [commit.commit_id for commit in commits[:2]] == [second, first]
        assert commits[0].title == "Upload config.json with huggingface_hub" and commits[2].title == "initial commit"
        with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
            api.upload_file(path_or_fileobj=b"newer", parent_commit=first, **config)
        answer = first, second, on_branch
    """)
    assert hub.read("tester/model", "config.json", first) == b"{}"
    assert hub.read("tester/model", "config.json", second) == hub.read("tester/model", "config.json") == b"new"
    assert hub.read("tester/model", "config.json", on_branch) == b"branch"


def test_deletes_files_and_folders(hub, client):
    client("""
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path="model")
        api.upload_folder(repo_id=repo, folder_path="model", path_in_repo="unet2", delete_patterns="*")
        api.delete_folder("unet", repo)
        with pytest.raises(EntryNotFoundError, match="doesn't exist: none.txt"):
            api.delete_file("none.txt", repo)
        api.delete_file("config.json", repo)
    """)
    assert hub.files("tester/model") == [".gitattributes", "unet2/config.json", "unet2/unet/model.safetensors"]


def test_a_pull_request_leaves_main_alone(hub, client):
    client("""
        api.create_repo(repo)
        commit = api.upload_folder(repo_id=repo, folder_path="model", create_pr=True)
        assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
        assert api.upload_file(
            repo_id=repo, path_in_repo="more.txt", path_or_fileobj=b"1", revision="refs/pr/1"
        ).oid == api.model_info(repo, revision="refs/pr/1").sha
        assert api.upload_file(repo_id=repo, path_in_repo="b", path_or_fileobj=b"1", create_pr=True).pr_num == 2
        assert Path(hf_hub_download(repo, "more.txt", revision="refs/pr/1")).read_text() == "1"
        refs = api.list_repo_refs(repo, include_pull_requests=True)
        assert [branch.name for branch in refs.branches] == ["main"]
        assert [pull_request.ref for pull_request in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]
    """)
    assert hub.files("tester/model") == [".gitattributes"]
    assert hub.files("tester/model", "refs/pr/1") == [
        ".gitattributes",
        "config.json",
        "more.txt",
        "unet/model.safetensors",
    ]


def test_a_snapshot_outlives_the_hub(hub, client):
    folder = client("""
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path="model")
        answer = snapshot_download(repo, allow_patterns="unet/*")
        assert [path.name for path in Path(answer).rglob("*") if path.is_file()] == ["model.safetensors"]
    """)
    assert not any(path.endswith("config.json") for _, path in hub.requests)
    hub.close()
    requests = len(hub.requests)
    script = """
        answer = snapshot_download(repo, allow_patterns="unet/*")
        assert Path(hf_hub_download(repo, "unet/model.safetensors")).is_relative_to(answer)
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(repo, "config.json", local_files_only=True)
    """
    assert client(script) == client(script, HF_HUB_OFFLINE="1") == folder
    assert len(hub.requests) == requests


def test_cards(hub, client):
    client("""
        api.create_repo(repo)
        with pytest.raises(EntryNotFoundError):
            ModelCard.load(repo)
        card = ModelCard("---\\nlicense: mit\\ntags: [faces]\\nlibrary_name: diffusers\\n---\\n\\n# Faces")
        card.push_to_hub(repo)
        loaded = ModelCard.load(repo)
        assert (loaded.data.license, loaded.text.strip()) == ("mit", "# Faces")
        info = api.model_info(repo)
        assert (info.card_data.license, info.tags, info.library_name) == ("mit", ["faces"], "diffusers")
        api.upload_file(repo_id=repo, path_in_repo="docs/README.md", path_or_fileobj=b"---\\n[\\n---\\n")
        for header, message in {"license: [mit": "not YAML", "- mit": "a list, not a mapping"}.items():
            with pytest.raises(ValueError, match=message):
                content = f"---\\n{header}\\n---\\n".encode()
                api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=content)
        card.data.to_yaml = lambda **options: "- mit"
        with pytest.raises(ValueError, match="a list, not a mapping"):
            card.push_to_hub(repo)
        with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
            api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=b"# Faces")
    """)
    assert hub.read("tester/model", "README.md") == b"# Faces"


def test_what_is_missing_is_named_by_the_client(client):
    client("""
        api.create_repo(repo)
        upload = dict(path_in_repo="a", path_or_fileobj=b"1")
        for token in (None, False):
            with pytest.raises(RepositoryNotFoundError):
                hf_hub_download("tester/none", "config.json", token=token)
            with pytest.raises(RepositoryNotFoundError):
                api.model_info("tester/none", token=token)
            with pytest.raises(RepositoryNotFoundError):
                api.upload_file(repo_id="tester/none", token=token, **upload)
        with pytest.raises(RepositoryNotFoundError):
            api.dataset_info(repo)
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(repo, "config.json")
        with pytest.raises(EntryNotFoundError):
            list(api.list_repo_tree(repo, "unet"))
        for revision in ("none", "0" * 40):
            with pytest.raises(RevisionNotFoundError):
                hf_hub_download(repo, ".gitattributes", revision=revision)
            with pytest.raises(RevisionNotFoundError):
                snapshot_download(repo, revision=revision)
        with pytest.raises(RevisionNotFoundError):
            api.model_info(repo, revision="refs/pr/1")
        with pytest.raises(RevisionNotFoundError):
            api.upload_file(repo_id=repo, revision="none", **upload)
    """)


def test_private_and_gated_repositories(hub, client):
    client("""
        api.create_repo(repo, private=True)
        api.upload_folder(repo_id=repo, folder_path="model")
        assert Path(hf_hub_download(repo, "config.json")).is_file() and api.model_info(repo).private
        for call in (
            lambda: api.model_info(repo, token=False),
            lambda: hf_hub_download(repo, "config.json", token=False, cache_dir="other"),
            lambda: snapshot_download(repo, token=False, cache_dir="other"),
        ):
            with pytest.raises(RepositoryNotFoundError):
                call()
        api.create_repo("tester/public")
        hf_hub_download("tester/public", ".gitattributes", token=False)
        with pytest.raises(RepositoryNotFoundError, match="401"):
            api.upload_file(repo_id="tester/public", path_in_repo="a", path_or_fileobj=b"1", token=False)
    """)
    hub.gated.add("tester/model")
    client("""
        assert api.model_info(repo).gated == "manual"
        with pytest.raises(GatedRepoError, match="403"):
            hf_hub_download(repo, "config.json", cache_dir="other")
    """)


def test_a_failed_upload_leaves_main_unchanged(hub, client):
    upload = 'api.upload_folder(repo_id=repo, folder_path="model")'
    hub.fail_uploads = 1
    client(f"""
        api.create_repo(repo)
        with pytest.raises(RuntimeError, match="Error while uploading 'unet/model.safetensors'"):
            {upload}
    """)
    assert hub.fail_uploads == 0 and hub.files("tester/model") == [".gitattributes"]
    # the client itself tries again after a lost connection
    hub.cut_uploads = 1
    client(upload)
    assert hub.cut_uploads == 0 and hub.files("tester/model")[1:] == ["config.json", "unet/model.safetensors"]
    assert [method for method, _ in hub.requests].count("PUT") == 3


def test_a_commit_needs_its_large_files(client):
    client("""
        import httpx2, os
        api.create_repo(repo)
        large_file = {"path": "a.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3}
        lines = {"key": "header", "value": {"summary": "cheat"}}, {"key": "lfsFile", "value": large_file}
        answer = httpx2.post(
            f"{api.endpoint}/api/models/{repo}/commit/main",
            content="\\n".join(map(json.dumps, lines)),
            headers={"Authorization": f"Bearer {os.environ['HF_TOKEN']}"},
        ).json()
        assert "not uploaded" in answer["error"]
    """)


def test_datasets_are_apart_from_models(hub, client):
    client("""
        api.create_repo(repo)
        url = api.create_repo(repo, repo_type="dataset")
        assert (url.repo_id, url.repo_type) == (repo, "dataset")
        Path("data").mkdir()
        Path("data/faces.parquet").write_bytes(b"no parquet")
        upload = dict(repo_id=repo, folder_path="data", path_in_repo="data", repo_type="dataset")
        assert api.upload_folder(**upload, create_pr=True).pr_revision == "refs/pr/1"
        api.upload_folder(**upload)
        assert api.dataset_info(repo).siblings[1].rfilename == "data/faces.parquet"
        assert Path(hf_hub_download(repo, "data/faces.parquet", repo_type="dataset")).read_bytes() == b"no parquet"
        assert Path(snapshot_download(repo, repo_type="dataset"), "data/faces.parquet").is_file()
    """)
    assert hub.files("datasets/tester/model") == [".gitattributes", "data/faces.parquet"]
    assert hub.read("datasets/tester/model", "data/faces.parquet") == b"no parquet"
    assert hub.files("tester/model") == [".gitattributes"]
