"""The comparisons of detectors: a run is measured once, slim detectors are counted and timed, a table is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("pycocotools", reason="pip install cocktailsdk[detection]")
pytest.importorskip("yaml", reason="pip install cocktailsdk[detection]")

from cocktail_detection.catalog import CATALOG
from detection_shapes import EXAMPLE, register_tiny, write_coco, write_tiny

BENCHMARKS = EXAMPLE.parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, root: Path) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(CATALOG, "_known", dict(CATALOG._known))
    monkeypatch.setenv("COCKTAIL_DATASETS", str(root))
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register_tiny()
    return write_coco(tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize(("method", "passes"), [("cocktail", 1), ("mutualnet", 4)])
def test_a_run_is_measured_and_found_again(
    method: str, passes: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import detection
    from detection_rows import Task, lines, read, write

    task = Task("shapes", str(write_tiny(tmp_path, root)))
    monkeypatch.setattr(detection, "TASKS", {"bccd": task})
    row = detection.measure("bccd", method, 0, 12, 4, tmp_path / "out")
    channels = [name for name in row["networks"] if name.startswith("channel")]
    assert (row["steps"], row["passes"], row["images"]) == (12, 12 * passes, 48 * passes)
    assert len(channels) == (1 if method == "cocktail" else 10)
    assert all(0 <= found["bbox"]["AP"] <= 100 for found in row["networks"].values())
    assert all(row["flops"][name] < row["flops"]["dense"] for name in channels)

    partial = tmp_path / "out" / "networks.json"  # what was measured before a stop is not measured again
    kept = json.loads(partial.read_text())
    kept["dense"]["bbox"]["AP"] = 12.3456
    del kept[channels[-1]]
    partial.write_text(json.dumps(kept))
    again = detection.measure("bccd", method, 0, 12, 4, tmp_path / "out")
    assert again["networks"].pop("dense")["bbox"]["AP"] == 12.346
    assert row["networks"].pop("dense") and again["networks"] == row["networks"]
    assert again["losses"] == row["losses"] and again["fingerprint"] == row["fingerprint"]

    again["networks"]["dense"] = {"bbox": {"AP": 12.3456, "AP50": 20.0}}
    write([again], tmp_path / "rows.json")
    (line,) = lines(read(tmp_path / "rows.json"))
    assert line.dense == 12.3456 and line.passes == 12 * passes


def test_every_task_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cocktail_detection.catalog import register_builtin
    from cocktail_detection.config import get_cfg
    from cocktail_detection.engine import Setup
    from detection_rows import METHODS, TASKS

    monkeypatch.setenv("COCKTAIL_DATA", str(tmp_path))
    register_builtin()
    for name, task in TASKS.items():
        for method in METHODS.values():
            cfg = get_cfg()
            cfg.merge_from_file(EXAMPLE / "configs" / task.config)
            cfg.merge_from_list([*task.settings, *method])
            setup = Setup.of(cfg, classes=3)
            assert setup.train.name == f"{name.partition('-')[0]}_train"
            assert setup.test.name == f"{name.partition('-')[0]}_test"
            assert ("vgg" in cfg.MODEL.BACKBONE.NAME) == (task.paper == "VGG-16") == ("vgg" in name)
            assert (cfg.MODEL.META_ARCHITECTURE == "MaskRCNN") == name.startswith("nuclei")
            assert ("true" in method) == cfg.COCKTAIL.DISTILL
            assert (cfg.INPUT.MIN_SIZE_TEST == 0) == ("full" in name)  # images as they are
        levels = 1 if not cfg.MODEL.BACKBONE.FPN else len(cfg.MODEL.ANCHORS.SIZES)
        assert len(setup.model().rpn.anchor_generator.sizes) == levels, name


def test_the_table_is_of_all_tasks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import detection
    from detection_rows import RESULTS, read

    monkeypatch.setattr(sys, "argv", ["detection.py", "--table"])
    assert detection.main() == 0
    out = capsys.readouterr().out
    assert {row["task"] for row in read(RESULTS)} >= {"bccd", "nuclei", "bccd-vgg", "nuclei-vgg"}
    assert all(f"│ {row['task']} " in out for row in read(RESULTS))
    monkeypatch.setattr(sys, "argv", ["detection.py", "--table", "--task", "bccd-vgg"])
    assert detection.main() == 0 and "nuclei" not in capsys.readouterr().out


def test_no_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import detection

    results = tmp_path / "rows.json"
    monkeypatch.setenv("COCKTAIL_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["detection.py", "--minutes", "0", "--results", str(results)])
    assert detection.main() == 0 and not results.exists()
    monkeypatch.setattr(sys, "argv", ["detection.py", "--task", "yolo"])
    with pytest.raises(SystemExit):
        detection.main()


@pytest.mark.parametrize("name", ["FasterRCNN", "DETR"])
def test_slim_detectors_are_counted_and_timed(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import detection_costs
    from detection_rows import Row

    config = write_tiny(tmp_path, root, f"MODEL: {{META_ARCHITECTURE: {name}}}\n")
    monkeypatch.setattr(detection_costs, "DETECTORS", {"tiny": str(config)})
    monkeypatch.setattr(detection_costs, "NETWORKS", ("channel@0.271", "channel@0.613"))
    rows: list[Row] = []
    detection_costs.measure("tiny", {"channel@0.271"}, 64, 1, rows.append)
    (row,) = rows  # the first has a row already
    assert row["network"] == "channel@0.613" and row["image"] == [3, 64, 85]
    assert 0 < row["flops"] < 0.7 and 0 < row["parameters"] < 0.7
    assert row["times_as_fast"] > 0 and row["dense_seconds"] >= 0
    assert row["onnx_apart"] < 1e-4 and row["onnx_times_as_fast"] > 0
    assert row["onnx_part"] == ("whole" if name == "DETR" else "backbone")  # DETR has no proposals


def test_regions_are_the_same_for_both(root: Path, tmp_path: Path) -> None:
    import detection_costs
    from cocktail_detection.config import get_cfg
    from cocktail_detection.data import example_images
    from cocktail_detection.models import build_model

    cfg = get_cfg()
    cfg.merge_from_file(write_tiny(tmp_path, root))
    models = []
    for seed in (0, 1):
        cfg.SEED = seed
        models.append(build_model(cfg, 5).eval())
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for i, model in enumerate(models):
        model.roi_heads.register_forward_pre_hook(lambda _m, args, i=i: seen[i].append(args[1][0]))
    with torch.no_grad():
        for model in models:
            model(example_images(cfg))
        with detection_costs.same_regions(*models):
            for model in models:
                model(example_images(cfg))
        models[1](example_images(cfg))
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[1][1], seen[1][0]) and torch.equal(seen[1][0], seen[1][2])  # as before, afterwards


def test_what_has_a_row_is_not_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import detection_costs

    results = tmp_path / "costs.json"
    results.write_bytes((BENCHMARKS / "results" / "detection_costs.json").read_bytes())
    known = {row["detector"] for row in json.loads(results.read_text())["rows"]}
    monkeypatch.setattr(detection_costs, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["detection_costs.py", "--results", str(results), "--only", *sorted(known)])
    assert detection_costs.main() == 0
