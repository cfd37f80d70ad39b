import json

import numpy as np
import PIL.Image
import pytest
from conftest import draw_person

from uiface_diffusers import cli
from uiface_diffusers.data import FaceCache, FaceCacheSource, prepare_faces, read_benchmark
from uiface_diffusers.evaluation import (
    load_recognizer,
    measure_groups,
    measure_verification,
    pose_statistics,
    read_groups,
)
from uiface_diffusers.evaluation.groups import best_threshold, pair_groups
from uiface_diffusers.evaluation.intervals import wilson_interval
from uiface_diffusers.evaluation.verification import embed_benchmark
from uiface_diffusers.faces import FaceEncoder


def scores_of_groups(seed=0):
    """Of 400 pairs of three groups that differ, and some of none; with ties."""
    generator = np.random.default_rng(seed)
    names = generator.choice(["a", "b", "c", None], 400, p=[0.4, 0.3, 0.2, 0.1]).tolist()
    same = generator.random(400) < 0.5
    shift = np.array([{"a": 0.0, "b": 0.05, "c": 0.15, None: 0.9}[name] for name in names])
    return np.round(generator.normal(0.1 + 0.35 * same + shift, 0.15), 2), same, names


@pytest.mark.parametrize("fmr", [None, 0.1, 0.02])
def test_rates_of_groups_by_brute_force(fmr):
    scores, same, names = scores_of_groups()
    result = measure_groups(scores, same, names, fmr)
    pairs = [pair for pair in zip(scores.tolist(), same.tolist(), names, strict=True) if pair[2] is not None]

    def right(threshold):
        return sum((score >= threshold) == genuine for score, genuine, _ in pairs)

    def false_matches(threshold, group=None):
        accepted = [score >= threshold for score, genuine, name in pairs if not genuine and name == (group or name)]
        return sum(accepted) / len(accepted)

    if fmr is None:
        most = max(right(score) for score, _, _ in pairs)
        assert result.threshold == min(score for score, _, _ in pairs if right(score) == most)
    else:
        assert false_matches(result.threshold) <= fmr < false_matches(np.nextafter(result.threshold, -1))
    assert list(result.groups) == ["a", "b", "c"]
    measured = {"accuracy": [], "fmr": [], "fnmr": []}
    for name, rates in result.groups.items():
        own = [(score >= result.threshold, genuine) for score, genuine, group in pairs if group == name]
        genuine = [accepted for accepted, is_genuine in own if is_genuine]
        assert (rates.genuine, rates.impostor) == (len(genuine), len(own) - len(genuine))
        accuracy = sum(accepted == is_genuine for accepted, is_genuine in own) / len(own)
        assert rates.accuracy == pytest.approx((accuracy, *wilson_interval(accuracy, len(own))), abs=1e-12)
        assert rates.fmr.rate == pytest.approx(false_matches(result.threshold, name), abs=1e-12)
        assert rates.fnmr.rate == pytest.approx(1 - sum(genuine) / len(genuine), abs=1e-12)
        for measure, values in measured.items():
            values.append(getattr(rates, measure).rate)
    for measure, values in measured.items():
        mean = sum(values) / 3
        assert result.spread[measure]["range"] == pytest.approx(max(values) - min(values), abs=1e-12)
        assert result.spread[measure]["std"] == pytest.approx(
            (sum((v - mean) ** 2 for v in values) / 3) ** 0.5, abs=1e-9
        )


def test_groups_without_pairs_of_a_kind():
    scores, same = np.array([0.1, 0.5, 0.9, 0.2]), np.array([False, True, True, False])
    result = measure_groups(scores, same, ["x", "y", "y", "x"])
    assert result.groups["x"].fnmr is None and result.groups["y"].fmr is None
    assert result.threshold == 0.5 and result.spread["fmr"] == {"range": 0, "std": 0}
    only = measure_groups(scores[same], same[same], ["y", "y"])
    assert "fmr" not in only.spread and ", -," in only.lines()[1] and json.dumps(only.to_dict())
    assert best_threshold(np.array([0.3, 0.9]), np.array([False, False])) == np.inf


def test_what_cannot_be_measured_is_named():
    scores, same, names = scores_of_groups()
    with pytest.raises(ValueError, match="no pair has a group"):
        measure_groups(scores, same, [None] * 400)
    with pytest.raises(ValueError, match="400 scores, 400 labels and 399 groups"):
        measure_groups(scores, same, names[1:])
    with pytest.raises(ValueError, match="false match rate of 0.0001 would be less than one of"):
        measure_groups(scores, same, names, 1e-4)


def test_files_of_groups(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_text('name,group\nAnna,one\n"Smith, John",two\nPeter/Peter_0002.jpg,three\nset/Jose\u0301,one\n\n')
    groups = read_groups(file)
    assert groups.of("Anna/Anna_0001") == groups.of("images/Anna/1.png") == groups.of("Anna") == "one"
    assert groups.of("Smith, John/1.jpg") == "two"
    assert groups.of("Peter/Peter_0002") == groups.of("Peter/Peter_0002.jpg") == "three"
    assert groups.of("Peter/Peter_0001") is None and groups.of("set/Jos\u00e9/4.jpg") == "one"
    found = pair_groups(groups, [("Anna/1", "Anna/2"), ("Anna/1", "Smith, John/1"), ("Anna/1", "Eve/1")])
    assert found == (["one", None, None], 1, 1)
    with pytest.raises(ValueError, match="none of 1 pairs is of one group, such as Eve/1 and Eve/2"):
        pair_groups(groups, [("Eve/1", "Eve/2")])
    for text, message in (
        ("Anna\n", "line 1, is 'Anna', neither NAME,GROUP nor FILE,GROUP"),
        ("Anna,one\nAnna,two\n", "line 2: Anna is in `two`, and in `one` before"),
        ("Anna\tone\nEve\t\n", "line 2"),
        ("name,group\n", "names no groups"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_groups(file)


def test_groups_of_benchmarks_and_of_pairs(tmp_path, toy_root, capsys):
    """RFW's form, one benchmark per group; and a list of pairs with people's groups."""
    generator = np.random.default_rng(0)
    colors = {f"p{number}": tuple(generator.integers(0, 256, 3).tolist()) for number in range(6)}
    for name, color in colors.items():
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for index in range(1, 5):
            shade = tuple(int(value) for value in np.clip(np.array(color) + generator.integers(-60, 61, 3), 0, 255))
            draw_person(shade).resize((112, 112)).save(tmp_path / "photographs" / name / f"{name}_{index:04d}.png")
    pack = ["--encoder-root", str(toy_root), "--aligned"]
    arguments = ["--images", str(tmp_path / "photographs"), "--aligned"]
    for group, people in (("first", ("p0", "p1", "p2")), ("second", ("p3", "p4", "p5"))):
        lines = ["10\t1"]
        for fold in range(10):
            name, other = people[fold % 3], people[(fold + 1) % 3]
            lines += [f"{name}\t{1 + fold % 2}\t{3 + fold % 2}", f"{name}\t{1 + fold % 2}\t{other}\t{1 + fold % 3}"]
        (tmp_path / f"{group}.txt").write_text("\n".join(lines))
        output = ["--output", str(tmp_path / "benchmarks" / f"{group}.bin")]
        cli.main(["make-benchmark", "--pairs", str(tmp_path / f"{group}.txt"), *output, *arguments])
    (tmp_path / "groups.csv").write_text("first,one\nsecond,two\n")
    benchmarks = ["--benchmarks", str(tmp_path / "benchmarks"), "--groups", str(tmp_path / "groups.csv")]
    cli.main(["verify", "toy", *pack, *benchmarks, "--output", str(tmp_path / "figures")])
    report = json.loads((tmp_path / "figures" / "groups.json").read_text())

    recognizer, scores, same = load_recognizer("toy", toy_root), [], []
    for group in ("first", "second"):
        benchmark = read_benchmark(tmp_path / "benchmarks" / f"{group}.bin")
        result = measure_verification(embed_benchmark(recognizer, benchmark), benchmark.same)
        cosines = np.empty(20)
        cosines[benchmark.same], cosines[~benchmark.same] = result.genuine, result.impostor
        scores, same = [*scores, *cosines], [*same, *benchmark.same]
    expected = measure_groups(scores, same, ["one"] * 20 + ["two"] * 20).to_dict()
    assert report == {"recognizer": "toy", **json.loads(json.dumps(expected))}
    assert "one (10 genuine, 10 impostor)" in capsys.readouterr().out

    # of pairs, by person: those of p0 with p1 are across groups, p2 has none
    (tmp_path / "people.csv").write_text("p0,one\np1,two\n")
    pairs = ["--pairs", str(tmp_path / "first.txt"), *arguments, "--groups", str(tmp_path / "people.csv")]
    cli.main(["verify", "toy", *pack, *pairs])
    printed = capsys.readouterr().out
    assert "one (4 genuine, 0 impostor)" in printed and "two (3 genuine, 0 impostor)" in printed
    assert (
        "left out: 4 pairs of two groups" in printed and "left out: 9 pairs with a photograph of no group" in printed
    )

    for options, message in (
        ([*benchmarks[:2], "--group-fmr", "0.1"], "--group-fmr needs --groups"),
        ([*benchmarks[:3], str(tmp_path / "people.csv")], "none of 2 pairs is of one group, such as first and first"),
        ([*benchmarks[:3], str(tmp_path / "absent.csv")], "absent.csv"),
    ):
        with pytest.raises(SystemExit, match=f"uiface verify: .*{message}"):
            cli.main(["verify", "toy", *pack, *options])


def test_poses_of_groups(tmp_path, toy_root, toy_photographs, capsys):
    prepare_faces(toy_photographs, tmp_path / "cache", FaceEncoder("toy", str(toy_root), det_size=160))
    (tmp_path / "groups.csv").write_text("person_0,x\nperson_1,y\nperson_2/3.png,y\n")
    cli.main(["poses", str(tmp_path / "cache"), "--groups", str(tmp_path / "groups.csv")])
    assert "y: 7 faces, 7 with a pose, 0 look sideways" in capsys.readouterr().out
    cache = FaceCache(tmp_path / "cache")
    statistics = pose_statistics(cache, read_groups(tmp_path / "groups.csv"))
    files = [photograph.file for photograph in FaceCacheSource(cache.folder).photographs]
    of_y = [file.startswith("person_1/") or file == "person_2/3.png" for file in files]
    yaw, pitch = cache.poses()[of_y].astype(np.float64).T
    assert {name: each["faces"] for name, each in statistics.items()} == {"": 11, "x": 6, "y": 7}
    for values, name in ((yaw, "yaw"), (pitch, "pitch")):
        found = statistics["y"][name]
        assert (found["mean"], found["std"]) == pytest.approx((values.mean(), values.std()), abs=1e-6)
        assert found["quantiles"]["0.95"] == pytest.approx(np.quantile(values, 0.95), abs=1e-6)

    # of aligned faces no pose is known
    (tmp_path / "aligned" / "person").mkdir(parents=True)
    PIL.Image.new("RGB", (112, 112), (200, 0, 70)).save(tmp_path / "aligned" / "person" / "1.png")
    prepare_faces(tmp_path / "aligned", tmp_path / "other", FaceEncoder("toy", str(toy_root)), aligned=True)
    assert pose_statistics(FaceCache(tmp_path / "other")) == {
        "": {"faces": 1, "poses_known": 0, "side_views": 0, "yaw": None, "pitch": None}
    }
    cli.main(["poses", str(tmp_path / "other"), "--output", str(tmp_path / "poses.json")])
    assert json.loads((tmp_path / "poses.json").read_text())[""]["yaw"] is None
    with pytest.raises(SystemExit, match="no cache of prepared faces"):
        cli.main(["poses", str(tmp_path)])
