import json
import tracemalloc
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import draw_person
from killed import run_until_complete

from uiface_diffusers import cli
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.data.file_list import open_source_or_list
from uiface_diffusers.evaluation import embedding, load_recognizer, measure_identification
from uiface_diffusers.evaluation.embedding import embed_faces, embed_source
from uiface_diffusers.evaluation.identification import exact_unit_vectors
from uiface_diffusers.evaluation.intervals import accept_interval, wilson_interval
from uiface_diffusers.evaluation.verification import true_accept_interval, true_accept_rate
from uiface_diffusers.faces import FaceEncoder


def gallery_and_probes(people=40, outside=25, dimensions=12, noise=0.7, seed=0):
    """One to four references of each person, two probes of each, and probes of others; lengths differ. Some references
    are enrolled for a second person, too, and some probes are equal to others: exact ties."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(people + outside, dimensions))
    names = np.repeat(np.arange(people), generator.integers(1, 5, people))
    names = generator.permutation(names)
    probe_names = generator.permutation(np.repeat(np.arange(people + outside), 2))
    gallery = centers[names] + noise * generator.normal(size=(len(names), dimensions))
    probes = centers[probe_names] + noise * generator.normal(size=(len(probe_names), dimensions))
    gallery, probes = (each * generator.uniform(1, 30, (len(each), 1)) for each in (gallery, probes))
    gallery[:6] = gallery[6:12]
    probes[:8] = probes[8:16]
    return (
        gallery.astype(np.float32),
        [f"person {name}" for name in names],
        probes.astype(np.float32),
        [f"person {name}" for name in probe_names],
    )


def brute_force(gallery, gallery_names, probes, probe_names):
    """The search read aloud, probe after probe and reference after reference: (mate's score, mate's rank) of mated
    probes, the highest score of the others."""
    unit = [row / np.sqrt(row @ row) for row in gallery.astype(np.float64)]
    mated, others = [], []
    for probe, name in zip(probes.astype(np.float64), probe_names, strict=True):
        probe = probe / np.sqrt(probe @ probe)
        scores = {}
        for row, owner in zip(unit, gallery_names, strict=True):
            scores[owner] = max(scores.get(owner, -2), round(float(probe @ row), 9))
        if name in scores:
            mated.append((scores[name], sum(score >= scores[name] for score in scores.values())))
        else:
            others.append(max(scores.values()))
    return mated, others


@pytest.mark.parametrize("rank", [1, 3, None])
def test_all_measures_by_brute_force(rank):
    data = gallery_and_probes()
    result = measure_identification(*data, rank=rank)
    mated, others = brute_force(*data)
    assert np.allclose(result.mated_scores, [score for score, _ in mated], atol=1e-6)
    assert result.mated_ranks.tolist() == [place for _, place in mated]
    assert np.allclose(result.non_mated_scores, others, atol=1e-6)
    assert (result.identities, result.references) == (40, len(data[1]))
    assert max(place for _, place in mated) > 5

    for k in (1, 2, 5, 10):
        assert result.rank_rate(k).rate == pytest.approx(np.mean([place <= k for _, place in mated]), abs=1e-12)

    def fnir(threshold):
        return np.mean([score < threshold or place > (rank or 40) for score, place in mated])

    def fpir(threshold):
        return np.mean([score >= threshold for score in others])

    thresholds = sorted({score for score, _ in mated} | set(others), reverse=True)
    curve = np.stack(result.det(), 1)
    assert curve[0].tolist() == [0, 1, np.inf] and len(curve) == len(thresholds) + 1
    for threshold, point in zip(thresholds, curve[1:], strict=True):
        assert point == pytest.approx([fpir(threshold), fnir(threshold), threshold], abs=1e-6)
        between = threshold - 1e-7
        assert (result.fpir(between), result.fnir(between)) == pytest.approx((fpir(between), fnir(between)), abs=1e-6)
    for rate in (0.02, 0.1, 0.3):
        found = result.tpir_at(rate)
        best = max(1 - fnir(threshold) for threshold in [2, *thresholds] if fpir(threshold) <= rate)
        # a threshold between two scores accepts what those at the upper one do
        assert found.rate == pytest.approx(best, abs=1e-6) and found.low <= found.rate <= found.high
        assert result.fpir(found.threshold) <= rate < result.fpir(np.nextafter(found.threshold, -1))
        assert 1 - result.fnir(found.threshold) == pytest.approx(found.rate, abs=1e-12)
    assert result.tpir_at(0.01) is None  # half a search of fifty


def test_blocks_and_order_do_not_change_a_bit():
    gallery, names, probes, probe_names = data = gallery_and_probes(seed=1)
    whole = measure_identification(*data)
    for gallery_rows, probe_rows in ((1, 7), (5, 64), (17, 1)):
        blocks = measure_identification(*data, gallery_rows=gallery_rows, probe_rows=probe_rows)
        assert np.array_equal(blocks.mated_scores, whole.mated_scores)
        assert np.array_equal(blocks.mated_ranks, whole.mated_ranks)
        assert np.array_equal(blocks.non_mated_scores, whole.non_mated_scores)
    order = np.random.default_rng(0).permutation(len(names))
    shuffled = measure_identification(gallery[order], [names[place] for place in order], probes, probe_names)
    assert np.array_equal(shuffled.mated_ranks, whole.mated_ranks)


def test_ties_count_against_the_recognizer():
    """One that maps every face to one vector finds nobody."""
    face = np.random.default_rng(0).normal(size=(1, 512)).astype(np.float32)
    result = measure_identification(
        np.repeat(face, 30, 0), range(30), np.repeat(face, 20, 0), [*range(10), *range(90, 100)], gallery_rows=7
    )
    assert (result.mated_ranks == 30).all() and result.rank_rate(1).rate == 0 and result.rank_rate(30).rate == 1
    assert result.tpir_at(0.1).rate == 0 and result.fpir(result.tpir_at(0.1).threshold) == 0
    assert result.fpir(result.mated_scores[0]) == 1  # candidates at the threshold are returned


def test_unit_vectors_are_exact_in_any_order():
    rows = exact_unit_vectors(np.random.default_rng(0).normal(size=(50, 512)).astype(np.float32))
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-7)
    products = rows[:25] * rows[25:]
    assert np.array_equal(products.sum(axis=1), products[:, ::-1].cumsum(axis=1)[:, -1])
    assert np.array_equal(np.einsum("ij,ij->i", rows[:25], rows[25:]), np.diag(rows[:25] @ rows[25:].T))


def test_memory_is_bounded_by_blocks():
    """All scores at once would be 320 MB."""
    generator = np.random.default_rng(0)
    gallery, probes = (generator.normal(size=(number, 32)).astype(np.float32) for number in (20_000, 2_000))
    tracemalloc.start()
    try:
        measure_identification(gallery, range(20_000), probes, range(19_000, 21_000), gallery_rows=512, probe_rows=256)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6


def test_what_cannot_be_searched_is_named():
    gallery, names, probes, probe_names = gallery_and_probes()
    with pytest.raises(ValueError, match="none of 130 probes is of a person in the gallery"):
        measure_identification(gallery, [f"another {name}" for name in names], probes, probe_names)
    with pytest.raises(ValueError, match=r"the gallery has \(\d+, 12\) embeddings and 3 identities"):
        measure_identification(gallery, names[:3], probes, probe_names)
    with pytest.raises(ValueError, match="12 and 11 dimensions"):
        measure_identification(gallery, names, probes[:, :11], probe_names)
    with pytest.raises(ValueError, match="counts from 1"):
        measure_identification(gallery, names, probes, probe_names, rank=0)
    probes[3] = 0
    with pytest.raises(ValueError, match="1 embeddings of the set of probes are zero or not finite, such as in row 3"):
        measure_identification(gallery, names, probes, probe_names)
    closed = measure_identification(gallery, names, gallery, names)
    assert closed.tpir_at(0.5) is None and "too few non-mated" in closed.lines()[1]
    with pytest.raises(ValueError, match="outside the gallery"):
        closed.det()


def test_intervals_are_those_of_the_slow_bootstrap():
    generator = np.random.default_rng(0)
    for shift, far in ((2.0, 0.02), (1.0, 0.1), (9.0, 0.01)):
        genuine, impostor = generator.normal(shift, 1, 150), generator.normal(0, 1, 200)
        slow = true_accept_interval(genuine, impostor, far, num_resamples=4000)
        assert accept_interval(genuine, impostor, far, num_resamples=4000) == pytest.approx(slow, abs=0.02)
    low, high = wilson_interval(true_accept_rate(genuine, impostor, 0.01)[0], 150)
    assert (low, high) == pytest.approx((1 / (1 + 1.96**2 / 150), 1), abs=1e-9)


@pytest.fixture
def people(tmp_path):
    """`gallery/p0` to `p3`, one photograph each, `probes/` with another one of these and two of `p8` and `p9`; one
    without a face."""
    colors = {"p0": (0, 255, 0), "p1": (0, 0, 255), "p2": (255, 255, 255), "p3": (0, 0, 0), "p8": (255, 255, 0)}
    colors |= {"p9": (0, 255, 255)}
    for name, color in colors.items():
        for part, x in (("gallery", 78), ("probes", 82)):
            if part == "probes" or name < "p8":
                (tmp_path / part / name).mkdir(parents=True)
                draw_person(color, ((x, 80, 44),)).save(tmp_path / part / name / "1.png")
    PIL.Image.new("RGB", (160, 160), (90, 90, 90)).save(tmp_path / "probes" / "p9" / "2.png")
    (tmp_path / "probes" / "p9" / "3.png").write_bytes(b"no picture")
    (tmp_path / "probes" / "p9" / "notes.txt").write_text("no picture")
    return tmp_path


def test_from_photographs_to_figures(people, toy_root, capsys):
    pack = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160"]
    arguments = ["identify", "toy", "--gallery", str(people / "gallery"), "--probes", str(people / "probes"), *pack]
    cli.main([*arguments, "--output", str(people / "figures")])
    printed = capsys.readouterr().out
    assert "4 faces of 4 people in the gallery; 4 mated and 3 non-mated searches" in printed
    assert "probes: 1 without a face: the center was taken: p9/2.png" in printed
    assert "probes: 1 unreadable: p9/3.png" in printed and "notes.txt" in printed
    report = json.loads((people / "figures" / "identification.json").read_text())
    assert report["recognizer"] == "toy" and report["probes_skipped"] == {"p9/3.png": "unreadable"}
    assert PIL.Image.open(people / "figures" / "det.png").size[0] > 300

    recognizer, encoder = load_recognizer("toy", toy_root), FaceEncoder("toy", str(toy_root), det_size=160)
    embedded = [
        embed_source(recognizer, open_source_or_list(people / each), encoder, each) for each in ("gallery", "probes")
    ]
    expected = measure_identification(*(part for each in embedded for part in (each.features, each.identities)))
    assert report["rank_rates"]["1"]["rate"] == expected.rank_rate(1).rate
    # features are those of face and mirror image
    faces = list(np.random.default_rng(0).integers(0, 256, (70, 112, 112, 3), np.uint8))
    both = recognizer(np.stack(faces)) + recognizer(np.stack(faces)[:, :, ::-1])
    assert np.allclose(embed_faces(recognizer, faces, 99, "noise"), both, atol=1e-4)

    # a cache's faces are aligned already: nothing is detected in them
    prepare_faces(people / "gallery", people / "cache", encoder)
    cached = embed_source(recognizer, open_source_or_list(people / "cache"), None, "cache")
    expected = measure_identification(
        cached.features, cached.identities, *(getattr(embedded[1], name) for name in ("features", "identities"))
    )
    cli.main([*arguments[:3], str(people / "cache"), *arguments[4:], "--output", str(people / "figures")])
    report = json.loads((people / "figures" / "identification.json").read_text())
    assert report["rank_rates"]["1"]["rate"] == expected.rank_rate(1).rate and report["gallery_skipped"] == {}
    assert "center was taken: p9" in capsys.readouterr().out

    # lists of files, of faces that are aligned
    (people / "gallery.csv").write_text("".join(f"gallery/p{n}/1.png,p{n}\n" for n in range(4)))
    (people / "probes.txt").write_text("probes/p0/1.png\nprobes/p8/1.png\ngallery/p1/1.png\nprobes/p0/1.png\n")
    arguments[3:6:2] = str(people / "gallery.csv"), str(people / "probes.txt")
    cli.main([*arguments, "--aligned", "--rank", "none"])
    printed = capsys.readouterr().out
    assert "2 mated and 1 non-mated" in printed and "probes: 1 listed twice: probes/p0/1.png (line 4)" in printed
    assert "1 probes are photographs of the gallery, such as gallery/p1/1.png" in printed


def test_killed_and_resumed_gives_the_same_figures(people, toy_root, capsys):
    pack = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160"]
    arguments = ["identify", "toy", "--gallery", str(people / "gallery"), "--probes", str(people / "probes"), *pack]
    cli.main([*arguments, "--output", str(people / "whole")])
    printed = capsys.readouterr().out.replace("whole", "killed")
    killed = [*arguments, "--output", str(people / "killed")]
    run_until_complete(killed, ".safetensors")  # of the gallery
    (kept,) = (people / "killed" / "cache").rglob("*.safetensors")
    assert not (people / "killed" / "identification.json").exists()
    time = kept.stat().st_mtime_ns
    cli.main(killed)
    assert capsys.readouterr().out == printed and kept.stat().st_mtime_ns == time
    reports = [(people / name / "identification.json").read_bytes() for name in ("whole", "killed")]
    assert reports[0] == reports[1]

    # other photographs are embedded; what is damaged is named
    draw_person((0, 255, 0), ((70, 80, 44),), size=(170, 160)).save(people / "gallery" / "p0" / "1.png")
    cli.main(killed)
    assert kept.stat().st_mtime_ns == time and len(list((people / "killed" / "cache").rglob("*.safetensors"))) == 3
    for file in (people / "killed" / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(SystemExit, match=r"uiface identify: .*000000.safetensors.* Delete it, and it is computed"):
        cli.main(killed)


def test_blocks_of_photographs_are_joined(people, toy_root, monkeypatch):
    recognizer, encoder = load_recognizer("toy", toy_root), FaceEncoder("toy", str(toy_root), det_size=160)
    source = open_source_or_list(people / "probes")
    whole = embed_source(recognizer, source, encoder, "probes")
    monkeypatch.setattr(embedding, "KEPT_TOGETHER", 3)
    for folder in (None, people / "kept", people / "kept"):
        parts = embed_source(recognizer, source, encoder, "probes", folder)
        assert np.allclose(parts.features, whole.features, atol=1e-4)
        for name in ("identities", "files", "digests", "skipped", "without_face", "left_out"):
            assert getattr(parts, name) == getattr(whole, name), name
    assert len(list((people / "kept").rglob("*.safetensors"))) == 3  # the last is of a file that is no picture
    # of another version, with other blocks
    monkeypatch.setattr(embedding, "KEPT_TOGETHER", 2)
    assert embed_source(recognizer, source, encoder, "probes", people / "kept").files == whole.files


def test_a_photograph_is_told_once(people, toy_root, monkeypatch):
    """Without a face its center is taken; that has no embedding either, and then it is left out."""

    class Colors:
        name, fingerprint, image_size = "colors", "none", 112

        def __call__(self, faces):
            return np.array([face.mean(axis=(0, 1)) for face in faces], np.float32)

    (people / "black" / "p0").mkdir(parents=True)
    PIL.Image.new("RGB", (160, 160)).save(people / "black" / "p0" / "0.png")
    PIL.Image.new("RGB", (160, 160), (9, 0, 0)).save(people / "black" / "p0" / "1.png")
    encoder, source = FaceEncoder("toy", str(toy_root), det_size=160), open_source_or_list(people / "black")
    monkeypatch.setattr(embedding, "KEPT_TOGETHER", 1)  # the first block has nothing
    found = embed_source(Colors(), source, encoder, "black")
    assert [Path(file).name for file in found.skipped] == ["0.png"]
    assert [Path(file).name for file in found.without_face] == [Path(file).name for file in found.files] == ["1.png"]
    (people / "black" / "p0" / "1.png").unlink()
    with pytest.raises(ValueError, match="black: no photograph gives an embedding"):
        embed_source(Colors(), open_source_or_list(people / "black"), encoder, "black")


def test_the_command_line_names_the_problem(people, toy_root):
    arguments = ["identify", "toy", "--encoder-root", str(toy_root), "--probes", str(people / "probes"), "--gallery"]
    (people / "list.txt").write_text("gallery/p0/1.png\ngallery/p0/9.png\n")
    (people / "two.csv").write_text("gallery/p0/1.png,a\ngallery/p0/1.png,b\n")
    (people / "other.csv").write_text("gallery/p0/1.png,somebody else\n")
    for gallery, message in (
        ("absent", "absent has no photographs"),
        ("list.txt", "1 of 2 files of .*gallery/p0/9.png"),
        ("two.csv", "line 2, says that gallery/p0/1.png is of `b`, an earlier line that it is of `a`"),
        ("other.csv", "none of 8 probes is of a person in the gallery, such as `p0`"),
    ):
        with pytest.raises(SystemExit, match=f"uiface identify: .*{message}"):
            cli.main([*arguments, str(people / gallery)])
