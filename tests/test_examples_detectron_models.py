"""The detection example's detectors: slim equals masked, training goes on after a stop, the scripts do it all."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

pytest.importorskip("pycocotools", reason="pip install cocktailsdk[detection]")
pytest.importorskip("yaml", reason="pip install cocktailsdk[detection]")

import analyze_model
import train_net
from cocktail_detection.analysis import left_whole, parts_found, prunable_table
from cocktail_detection.catalog import CATALOG, DatasetError, register_builtin, register_coco_instances
from cocktail_detection.config import get_cfg
from cocktail_detection.data import DetectionBatch, DetectionDataset
from cocktail_detection.engine import Setup, measured, trainer_of
from cocktail_detection.models import ARCHITECTURES
from detection_shapes import EXAMPLE, register_tiny, write_coco, write_tiny

import cocktailsdk as cocktail
from cocktailsdk.training.events import StepDone

CHANNEL = "channel@0.5"
FULL_SIZE = ["mask_rcnn_R_50_FPN", "faster_rcnn_VGG_16", "retinanet_R_50_FPN", "detr_R_50"]  # each kind of part once


@pytest.fixture(autouse=True)
def own_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(CATALOG, "_known", dict(CATALOG._known))


@pytest.fixture(autouse=True, scope="module")
def own_backbone() -> None:
    register_tiny()


@pytest.fixture(autouse=True)
def own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("datasets"))


def setup_of(folder: Path, root: Path, *pairs: Any) -> Setup:
    cfg = get_cfg()
    folder.mkdir(exist_ok=True)
    cfg.merge_from_file(write_tiny(folder, root))
    cfg.merge_from_list([str(p) for p in pairs])
    register_builtin(root)
    return Setup.of(cfg)


@pytest.fixture(scope="module")
def mask_rcnn(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, cocktail.CocktailNet]:
    """A Mask R-CNN and its networks, untrained; to be copied."""
    setup = setup_of(tmp_path_factory.mktemp("mask_rcnn"), root, "MODEL.META_ARCHITECTURE", "MaskRCNN")
    return setup, setup.net()


# --------------------------------------------------------------------------------- slim equals masked


def assert_slim_equals_masked(setup: Setup, net: cocktail.CocktailNet, images: list[torch.Tensor]) -> None:
    """On whole images, in float64: every box, class, score and mask."""
    small = net.slim(CHANNEL).double().eval()
    net.model.double().eval()
    images = [image.double() for image in images]
    with net.using(CHANNEL), torch.no_grad():
        masked = setup.architecture.detect(net.model, images)
    with torch.no_grad():
        slim = setup.architecture.detect(small, images)
    assert sum(len(d["boxes"]) for d in masked) > 0
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in net.model.parameters())
    for ours, theirs in zip(slim, masked, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-8, atol=1e-8)


@torch.no_grad()
def randomised(model: nn.Module) -> None:
    """Weights and statistics as far apart as after training, so that no two scores tie and removed channels count."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.3, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)


@pytest.mark.parametrize("name", ["MaskRCNN", "RetinaNet", "DETR"])
def test_slim_equals_masked_on_images(
    name: str, root: Path, tmp_path: Path, mask_rcnn: tuple[Setup, cocktail.CocktailNet]
) -> None:
    if name == "MaskRCNN":
        setup, net = mask_rcnn[0], copy.deepcopy(mask_rcnn[1])
    else:
        setup = setup_of(tmp_path, root, "MODEL.META_ARCHITECTURE", name, "COCKTAIL.PATTERNS", f"[{CHANNEL}]")
        net = setup.net()
    randomised(net.model)
    dataset = DetectionDataset(setup.test, setup.cfg, train=False, masks=False)
    noise = torch.Generator().manual_seed(0)  # on plain backgrounds scores tie, and rounding orders them
    images = [0.7 * dataset[i][0] + 0.3 * torch.rand(dataset[i][0].shape, generator=noise) for i in range(3)]
    assert_slim_equals_masked(setup, net, images)
    if name == "MaskRCNN":  # what exports is followed, proposals stay as they are
        scopes = net.coupling.trace.scopes
        assert scopes == (
            "backbone",
            "rpn.head",
            "roi_heads.box_head",
            "roi_heads.box_predictor",
            "roi_heads.mask_head",
            "roi_heads.mask_predictor",
        )
        groups = {group.name.split(".")[0] for group in net.coupling.groups}
        assert groups == {"backbone", "rpn", "roi_heads"}


@pytest.mark.data
def test_slim_equals_masked_on_real_images(
    mask_rcnn: tuple[Setup, cocktail.CocktailNet], root: Path, data_folder: Path
) -> None:
    if not (data_folder / "bccd").is_dir():
        pytest.skip(f"{data_folder} holds no bccd")
    setup, net = mask_rcnn[0], copy.deepcopy(mask_rcnn[1])
    register_builtin(root)
    setup.cfg.INPUT.MIN_SIZE_TEST = 0
    try:
        dataset = DetectionDataset(CATALOG.get("bccd_test"), setup.cfg, train=False, masks=False)
    finally:
        setup.cfg.INPUT.MIN_SIZE_TEST = 64
    randomised(net.model)
    assert_slim_equals_masked(setup, net, [dataset[i][0] for i in range(2)])


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name", FULL_SIZE)
def test_slim_equals_masked_at_full_width(name: str, tmp_path: Path, data_folder: Path) -> None:
    """Configurations as they are in their files, with COCO's classes, on images of COCO."""
    if not (data_folder / "coco_panoptic_mini").is_dir():
        pytest.skip(f"{data_folder} holds no coco_panoptic_mini")
    register_builtin(tmp_path)
    cfg = get_cfg()
    cfg.merge_from_file(EXAMPLE / "configs" / f"{name}.yaml")
    cfg.merge_from_list(["DATASETS.TRAIN", "coco_mini_train", "DATASETS.TEST", "coco_mini_val"])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", "96", "MODEL.DEVICE", "cpu", "COCKTAIL.PATTERNS", f"[{CHANNEL}]"])
    cfg.merge_from_list(["TEST.DETECTIONS_PER_IMAGE", "10", "MODEL.RPN.POST_NMS_TOPK_TEST", "100"])
    cfg.merge_from_list(["TEST.SCORE_THRESH", "0"])  # among eighty classes untrained scores are low
    setup = Setup.of(cfg)
    net = setup.net()
    randomised(net.model)
    dataset = DetectionDataset(setup.test, cfg, train=False, masks=False)
    assert_slim_equals_masked(setup, net, [dataset[0][0]])


# ------------------------------------------------------------------------------------------- training


def weights(net: cocktail.CocktailNet) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.model.state_dict().items()}


def changed(setup: Setup, folder: Path, *pairs: Any) -> Setup:
    cfg = copy.deepcopy(setup.cfg)
    cfg.merge_from_list(["OUTPUT_DIR", str(folder), *map(str, pairs)])
    return Setup.of(cfg)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_bit_by_bit(
    workers: int, mask_rcnn: tuple[Setup, cocktail.CocktailNet], tmp_path: Path
) -> None:
    """Images are flipped and scaled by chance, by processes of their own, too."""
    drawn = ("DATALOADER.NUM_WORKERS", workers, "INPUT.FLIP", "both", "INPUT.MIN_SIZE_TRAIN", "[48, 56, 64]")
    setup, net = changed(mask_rcnn[0], tmp_path / "a", *drawn), copy.deepcopy(mask_rcnn[1])
    trainer_of(setup, net).fit()
    seen: list[int] = []

    def stop(event: object) -> None:
        if isinstance(event, StepDone):
            seen.append(event.step)
            if len(seen) == 2:
                raise KeyboardInterrupt

    other = changed(mask_rcnn[0], tmp_path / "b", *drawn)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(other, copy.deepcopy(mask_rcnn[1]), [stop]).fit()
    again = copy.deepcopy(mask_rcnn[1])
    trainer_of(other, again).fit()
    for name, tensor in weights(net).items():
        assert torch.equal(tensor, weights(again)[name]), name


@pytest.mark.parametrize(
    ("name", "backbone", "pyramid"),
    [("MaskRCNN", "vgg11_bn", False), ("FasterRCNN", "vgg11", True), ("RetinaNet", "tiny", True), ("DETR", "", True)],
)
def test_every_kind_of_detector_trains(name: str, backbone: str, pyramid: bool, root: Path, tmp_path: Path) -> None:
    """Dense and sparse steps, the sparse ones with distillation; then every network is measured."""
    pairs = ["MODEL.META_ARCHITECTURE", name, "SOLVER.MAX_ITER", 8, "COCKTAIL.PATTERNS", f"[2:4, {CHANNEL}]"]
    pairs += ["COCKTAIL.START", "pretrained" if name == "RetinaNet" else "scratch"]
    if backbone:
        sizes = "[8, 16, 24, 32]" if backbone.startswith("vgg") else "[8, 16, 24, 32, 48]"
        pairs += ["MODEL.BACKBONE.NAME", backbone, "MODEL.BACKBONE.FPN", pyramid, "MODEL.ANCHORS.SIZES", sizes]
    setup = setup_of(tmp_path, root, *pairs)
    net = setup.net()
    before = weights(net)
    trainer = trainer_of(setup, net)
    trainer.fit()
    losses = [found for r in trainer.history.rounds for found in r.losses]
    assert {name for found in losses for name in found} == {"dense", "2:4", CHANNEL}
    assert all(math.isfinite(value) for found in losses for value in found.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(net).items())
    figures = measured(setup, net, trainer.using)
    assert set(figures) == {"dense", "2:4", CHANNEL} and all("AP" in found["bbox"] for found in figures.values())


def test_frozen_norms_are_pruned_too(root: Path, tmp_path: Path) -> None:
    pairs = ("MODEL.BACKBONE.NAME", "resnet18", "MODEL.BACKBONE.NORM", "FrozenBN", "COCKTAIL.PATTERNS", f"[{CHANNEL}]")
    setup = setup_of(tmp_path, root, *pairs)
    net = setup.net()
    randomised(net.model)
    frozen = [m for m in net.model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) == 20
    generator = torch.Generator().manual_seed(0)
    for module in frozen:
        module.running_mean.normal_(0, 0.3, generator=generator)
        module.running_var.uniform_(0.5, 2, generator=generator)
        module.bias.normal_(0, 0.3, generator=generator)
    dataset = DetectionDataset(setup.test, setup.cfg, train=False, masks=False)
    noise = 0.3 * torch.rand(dataset[0][0].shape, generator=generator)
    assert_slim_equals_masked(setup, net, [0.7 * dataset[0][0] + noise])


def test_excluded_modules_stay_whole(root: Path, tmp_path: Path) -> None:
    net = setup_of(tmp_path, root, "COCKTAIL.EXCLUDE", "[rpn, backbone.fpn]").net()
    names = {w.name for w in net.eligible} | {group.name for group in net.coupling.groups}
    assert names and not any(name.startswith(("rpn.", "backbone.fpn.")) for name in names)
    small, dense = net.slim(CHANNEL).state_dict(), net.model.state_dict()
    assert all(small[n].shape[0] == t.shape[0] for n, t in dense.items() if n.startswith(("rpn.", "backbone.fpn.")))


def test_a_run_in_bfloat16_is_close(mask_rcnn: tuple[Setup, cocktail.CocktailNet], tmp_path: Path) -> None:
    first = {}
    for precision in ("", "bf16"):
        trainer = trainer_of(
            changed(mask_rcnn[0], tmp_path / f"p{precision}", "SOLVER.PRECISION", precision),
            copy.deepcopy(mask_rcnn[1]),
        )
        trainer.fit()
        first[precision] = trainer.history.rounds[0].losses[0]["dense"]
        assert all(math.isfinite(v) for r in trainer.history.rounds for found in r.losses for v in found.values())
    assert first["bf16"] != first[""] and first["bf16"] == pytest.approx(first[""], rel=0.1)


def test_distillation_is_a_switch(mask_rcnn: tuple[Setup, cocktail.CocktailNet], tmp_path: Path) -> None:
    """The dense network's steps are the same with and without; sparse ones learn something else."""
    found = {}
    for switch in (True, False):
        net = copy.deepcopy(mask_rcnn[1])
        trainer = trainer_of(changed(mask_rcnn[0], tmp_path / str(switch), "COCKTAIL.DISTILL", switch), net)
        trainer.fit()
        found[switch] = trainer.history.rounds
    assert found[True][0].losses == found[False][0].losses  # round 0 is dense alone
    with_, without = ([epoch for r in found[switch] for epoch in r.losses] for switch in (True, False))
    pairs = zip(with_, without, strict=True)
    sparse = [(a[name], b[name]) for a, b in pairs for name in a if name != "dense"]
    assert sparse and all(a != b for a, b in sparse)


def test_mutualnet_draws_sides_of_images_and_boxes(
    mask_rcnn: tuple[Setup, cocktail.CocktailNet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = copy.deepcopy(mask_rcnn[1])
    setup = changed(mask_rcnn[0], tmp_path, "COCKTAIL.RECIPE", "mutualnet", "SOLVER.MAX_ITER", 3)
    shown: list[int] = []
    net.model.transform.register_forward_pre_hook(lambda _m, args: shown.append(min(args[0][0].shape[-2:])))
    trainer = trainer_of(setup, net)
    trainer.fit()
    assert trainer.history.steps == 3 and trainer.history.passes == 12  # dense, the narrowest of three patterns
    assert {64} < set(shown) <= {64, 56, 48, 37}
    assert all(math.isfinite(v) for losses in trainer.history.rounds[-1].losses for v in losses.values())


def test_merging_compares_networks_image_by_image(
    mask_rcnn: tuple[Setup, cocktail.CocktailNet], tmp_path: Path
) -> None:
    net = copy.deepcopy(mask_rcnn[1])
    setup = changed(mask_rcnn[0], tmp_path, "COCKTAIL.RECIPE", "paper", "COCKTAIL.HELD_OUT", 3)
    trainer = trainer_of(setup, net)
    trainer.fit()
    assert set(net.metrics) == {"dense", *(n for n in net.names if n != "dense")}
    assert all(0 <= value <= 1 for value in net.metrics.values())


# ----------------------------------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A Mask R-CNN, trained by the script on COCO's official layout; its folder and the command."""
    folder = tmp_path_factory.mktemp("script")
    path = write_tiny(folder, root, "MODEL: {META_ARCHITECTURE: MaskRCNN}\n")
    command = ["--config-file", str(path), "--num-gpus", "0"]
    with torch.random.fork_rng(devices=[]):
        assert train_net.main([*command, "SOLVER.MAX_ITER", "24"]) == 0
    return folder, command


def test_the_script_trains_measures_and_draws(trained: tuple[Path, list[str]]) -> None:
    run = trained[0] / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"dense", "unstructured@0.5", "2:4", CHANNEL}
    assert all(set(kinds) == {"bbox", "segm"} and 0 <= kinds["segm"]["AP"] <= 100 for kinds in metrics.values())
    with Image.open(run / "detections.png") as png:
        assert png.width > 1000
    cfg = get_cfg()
    cfg.merge_from_file(run / "config.yaml")
    assert cfg.SOLVER.MAX_ITER == 24 and cfg.MODEL.BACKBONE.NAME == "tiny"
    assert (run / "bundle").is_dir() and any((run / "state").iterdir())


def test_a_run_is_not_written_over_and_goes_on(
    trained: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = trained
    assert train_net.main([*command, "SOLVER.MAX_ITER", "24"]) == 1
    assert "holds a run already" in capsys.readouterr().err
    before = json.loads((folder / "run" / "metrics.json").read_text())
    assert train_net.main([*command, "--eval-only", "TEST.NETWORKS", f"[dense, {CHANNEL}]"]) == 0
    after = json.loads((folder / "run" / "metrics.json").read_text())
    assert after == {name: before[name] for name in ("dense", CHANNEL)}
    assert "mask AP" in capsys.readouterr().out


def test_two_processes_train_one_detector(root: Path, tmp_path: Path) -> None:
    """On processors, started by torchrun: batches are shared, one process writes, each measures its part."""
    path = write_tiny(
        tmp_path, root, "MODEL: {META_ARCHITECTURE: MaskRCNN}\nVIS: {IMAGES: 0}\nTEST: {IMS_PER_BATCH: 1}\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = str(Path(__file__).parent / "detection_program.py")
    command = [*torchrun, program, "--config-file", str(path), "--num-gpus", "0", "SOLVER.MAX_ITER", "16"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained in") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics) == {"dense", "unstructured@0.5", "2:4", CHANNEL}
    assert metrics["dense"]["bbox"]["AP50"] > 5  # it has learned; before, it finds nothing
    # What one process finds with the bundle in all images is what the two found in their halves.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert train_net.main(["--config-file", str(path), "--num-gpus", "0", "--eval-only"]) == 0
    finally:
        torch.set_num_threads(threads)
    alone = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name, kinds in metrics.items():
        for kind, figures in kinds.items():
            assert alone[name][kind] == pytest.approx(figures, abs=1e-6, nan_ok=True), (name, kind)


def test_a_process_that_fails_is_told_in_a_line(tmp_path: Path) -> None:
    """By what ``--num-gpus 2`` starts: a process says what is wrong (a file that is not there), then the launcher."""
    program = "import sys, train_net; sys.exit(train_net.launch(1, sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--config-file", str(tmp_path / "none.yaml"), "--num-gpus", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(EXAMPLE), *sys.path])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 1
    assert "none.yaml" in done.stderr and "process 0 of 1 ended with status 1" in done.stderr
    assert "ChildFailedError" not in done.stderr


def test_parts_are_listed_with_what_stays_whole(mask_rcnn: tuple[Setup, cocktail.CocktailNet]) -> None:
    parts = {part.name: part for part in parts_found(mask_rcnn[1])}
    assert tuple(parts) == mask_rcnn[1].coupling.trace.scopes
    assert parts["roi_heads.mask_head"].groups == 3 and parts["roi_heads.mask_head"].channels == 24
    assert 0 < parts["backbone"].maskable < parts["backbone"].parameters
    (reason,) = {why for part in parts.values() for why in part.kept}
    assert "exported alone" in reason
    assert [n for n in parts["backbone"].kept[reason] if n.startswith("fpn.layer_blocks")]
    console = Console(width=160, file=io.StringIO())
    console.print(prunable_table(mask_rcnn[1]))
    text = re.sub(r"[\s│]+", "", console.file.getvalue())  # cells go over several lines
    assert "roi_heads.mask_predictor" in text and "fpn.layer_blocks" in text
    assert any(line.startswith("the model: ") for line in left_whole(mask_rcnn[1]))


def test_other_classes_are_refused(mask_rcnn: tuple[Setup, cocktail.CocktailNet], tmp_path: Path) -> None:
    annotations = json.loads(json.dumps(mask_rcnn[0].test.annotations))
    annotations["categories"][0]["name"] = "triangle"
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    register_coco_instances("triangles", tmp_path / "a.json", tmp_path)
    setup = changed(mask_rcnn[0], tmp_path, "DATASETS.TEST", "triangles")
    with pytest.raises(DatasetError, match="'triangles' has triangle, circle"):
        measured(setup, mask_rcnn[1])


def test_networks_are_analysed_and_exported(
    trained: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = trained
    arguments = [*command[:2], "--networks", CHANNEL, "--repeats", "1", "--tasks"]
    pytest.importorskip("onnxscript", reason="writing ONNX needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="reading ONNX needs onnxruntime")
    assert analyze_model.main([*arguments, "cost", "export"]) == 0
    out = capsys.readouterr().out
    assert f"│ {CHANNEL}" in out and "│ dense" not in out
    path = folder / "run" / "onnx" / f"{CHANNEL}.onnx"
    assert float(out.rpartition("by")[2]) < 1e-4
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert len(session.get_outputs()) == 5
    assert session.run(None, {"images": torch.rand(3, 3, 64, 85).numpy()})[0].shape[0] == 3


def test_bad_input_is_told_in_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny(tmp_path, root)
    command = ["--config-file", str(path)]

    def told(*pairs: str) -> str:
        assert train_net.main([*command, *pairs]) == 1
        return capsys.readouterr().err.replace("\n", " ")

    assert "did you mean MODEL.META_ARCHITECTURE" in told("MODEL.META_ARCHITECTUR", "MaskRCNN")
    assert "which is not known" in told("MODEL.META_ARCHITECTURE", "YOLO")
    assert "no data set 'coco_2018'" in told("DATASETS.TRAIN", "coco_2018")
    assert "resnet999" in told("MODEL.BACKBONE.NAME", "resnet999")
    assert "cannot be read as tensors" in told("MODEL.WEIGHTS", str(tmp_path / "none.pth"))
    assert "give one for each level" in told("MODEL.ANCHORS.SIZES", "[8, 16]")
    assert "set COCKTAIL.HELD_OUT" in told("COCKTAIL.RECIPE", "paper")
    with pytest.raises(SystemExit):
        train_net.main([*command, "--num-gpus", "99"])
    assert "--num-gpus is 99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backbone", "pyramid", "maps"), [("resnet18", True, 5), ("vgg11_bn", False, 1), ("vgg11", True, 4)]
)
def test_backbones_of_torchvision(backbone: str, pyramid: bool, maps: int) -> None:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.update(NAME=backbone, FPN=pyramid, FPN_CHANNELS=8)
    cfg.MODEL.ANCHORS.SIZES = [8, 16, 32, 64, 128][:maps]
    cfg.MODEL.ROI_HEADS.FC_DIM = 8
    model = ARCHITECTURES["FasterRCNN"].build(cfg, 2).eval()
    with torch.no_grad():
        found = model.backbone(torch.rand(1, 3, 64, 64))
    found = [found] if isinstance(found, torch.Tensor) else list(found.values())
    assert len(found) == maps
    assert [f.shape[-1] for f in found] == ([4] if maps == 1 else [16, 8, 4, 2, 1][:maps])


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet"])
@pytest.mark.parametrize("train", [True, False])
def test_images_are_seen_in_the_size_in_which_they_come(name: str, train: bool) -> None:
    """Torchvision's detectors would resize them to 800 pixels."""
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.update(NAME="tiny", FPN_CHANNELS=8)
    cfg.MODEL.ROI_HEADS.FC_DIM = 8
    model = ARCHITECTURES[name].build(cfg, 2).train(train)
    seen: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape)))
    images = [torch.rand(3, 64, 90), torch.rand(3, 50, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}] * 2
    ARCHITECTURES[name].forward(model, DetectionBatch(images, targets))
    assert seen == [(2, 3, 64, 96)]  # padded to a multiple of 32


def test_weights_are_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", "tiny", "MODEL.BACKBONE.FPN_CHANNELS", "8", "MODEL.ROI_HEADS.FC_DIM", "8"]
    )
    from cocktail_detection.models import build_model

    cfg.SEED = 1
    other = build_model(cfg, 2)
    save_file(other.backbone.body.state_dict(), tmp_path / "body.safetensors")
    torch.save(other.state_dict(), tmp_path / "all.pth")
    cfg.SEED, cfg.MODEL.WEIGHTS = 0, str(tmp_path / "body.safetensors")
    model = build_model(cfg, 5)
    assert torch.equal(model.backbone.body.layer1[0].weight, other.backbone.body.layer1[0].weight)
    assert not torch.equal(model.rpn.head.cls_logits.weight, other.rpn.head.cls_logits.weight)
    cfg.MODEL.WEIGHTS = str(tmp_path / "all.pth")
    model = build_model(cfg, 5)  # of other classes: their predictor stays
    assert torch.equal(model.rpn.head.cls_logits.weight, other.rpn.head.cls_logits.weight)
    assert model.roi_heads.box_predictor.cls_score.out_features == 6
