"""The detection example's parts: configurations, data sets, batches, figures, drawings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pycocotools", reason="pip install cocktailsdk[detection]")
pytest.importorskip("yaml", reason="pip install cocktailsdk[detection]")

from cocktail_detection.catalog import (
    CATALOG,
    DatasetError,
    register_builtin,
    register_coco_instances,
    register_from,
    register_pascal_voc,
)
from cocktail_detection.config import Config, ConfigError, get_cfg
from cocktail_detection.data import DetectionBatch, DetectionDataset, collate, train_loaders
from cocktail_detection.distillation import DenseTeacher
from cocktail_detection.draw import chosen_networks, drawn, empty, write_comparison
from cocktail_detection.evaluation import coco_metrics, image_precisions, results_of
from cocktail_detection.models import ARCHITECTURES, Losses, architecture_of
from cocktail_detection.tables import jsonable, summary
from detection_shapes import EXAMPLE, shapes, write_coco, write_tiny


@pytest.fixture(autouse=True)
def own_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(CATALOG, "_known", dict(CATALOG._known))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def cfg(tmp_path: Path, root: Path) -> Config:
    cfg = get_cfg()
    cfg.merge_from_file(write_tiny(tmp_path, root))
    register_builtin(root)
    return cfg


# -------------------------------------------------------------------------------------------- configurations


def test_files_inherit_and_pairs_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LR: 1e-3, MAX_ITER: 5}\nMODEL: {BACKBONE: {NAME: vgg16}}\n")
    (tmp_path / "mine.yaml").write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 7}\n")
    cfg = get_cfg()
    cfg.merge_from_file(tmp_path / "mine.yaml")
    cfg.merge_from_list(["TEST.NETWORKS", "[dense]", "INPUT.MIN_SIZE_TRAIN", "64", "OUTPUT_DIR", "there"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.MODEL.BACKBONE.NAME) == (1e-3, 7, "vgg16")
    assert (cfg.TEST.NETWORKS, cfg.INPUT.MIN_SIZE_TRAIN, cfg.OUTPUT_DIR) == (["dense"], [64], "there")
    (tmp_path / "again.yaml").write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(tmp_path / "again.yaml")
    assert again == cfg
    assert get_cfg().SOLVER.MAX_ITER != 7
    cfg.merge_from_list(["COCKTAIL.PATTERNS", "2:4", "SOLVER.BASE_LR", "1e-4", "SOLVER.MOMENTUM", "0"])
    assert (cfg.COCKTAIL.PATTERNS, cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM) == (["2:4"], 1e-4, 0.0)
    cfg.merge_from_list(["MODEL.WEIGHTS", "", "OUTPUT_DIR", "2017", "DATASETS.TRAIN", "'mine'"])
    assert (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN) == ("", "2017", "mine")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("SOLVER: {MAX_ITR: 5}", "did you mean SOLVER.MAX_ITER"),
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER to 'many'; it takes a int"),
        ("SOLVER: 5", "it takes settings"),
        ("SEED: true", "it takes a int"),
        ("[1, 2]", "not settings by name"),
        ("SOLVER: {", "is no YAML"),
        ("_BASE_: mine.yaml", "inherits from itself"),
        ("_BASE_: none.yaml", "none.yaml, which .*mine.yaml inherits from, cannot be read"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        get_cfg().merge_from_file(tmp_path / "mine.yaml")


def test_pairs_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="'SEED' has no value"):
        get_cfg().merge_from_list(["SEED"])
    with pytest.raises(ConfigError, match="no setting"):
        get_cfg().merge_from_list(["SOLVER.NONE.SUCH", "1"])
    with pytest.raises(AttributeError, match="no setting 'NONE'"):
        _ = get_cfg().NONE


def test_every_configuration_that_ships_is_known() -> None:
    files = sorted((EXAMPLE / "configs").glob("*.yaml"))
    assert len(files) >= 8
    for file in files:
        cfg = get_cfg()
        cfg.merge_from_file(file)
        assert architecture_of(cfg) is ARCHITECTURES[cfg.MODEL.META_ARCHITECTURE]
    cfg.MODEL.META_ARCHITECTURE = "MaskRCN"
    with pytest.raises(ConfigError, match="did you mean MaskRCNN"):
        architecture_of(cfg)


# ------------------------------------------------------------------------------------------------- data sets


def test_names_that_are_not_registered(root: Path) -> None:
    register_builtin(root)
    with pytest.raises(DatasetError, match="did you mean 'coco_2017_val'"):
        CATALOG.get("coco_2017_vall")
    with pytest.raises(DatasetError, match="it takes json and images, or voc and split"):
        register_from({"mine": {"json": "a.json"}})
    register_from({"mine": {"json": str(root / "none.json"), "images": str(root)}})
    with pytest.raises(DatasetError, match="none.json cannot be read"):
        _ = CATALOG.get("mine").annotations
    (root / "none.json").write_text("{")
    with pytest.raises(DatasetError, match="cannot be understood"):
        _ = CATALOG.get("mine").annotations


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("images", None, "no list 'images'"),
        ("images", {"width": None}, "images\\[0\\] has no 'width'"),
        ("annotations", {"image_id": 99}, "annotations\\[0\\] is of image 99"),
        ("annotations", {"category_id": 99}, "annotations\\[0\\] is of category 99"),
        ("categories", [], "has no categories"),
    ],
)
def test_annotations_that_are_not_cocos(tmp_path: Path, part: str, change: Any, told: str) -> None:
    found = shapes(2, 0)[1]
    if isinstance(change, dict):
        for key, value in change.items():
            found[part][0][key] = value
            if value is None:
                del found[part][0][key]
    elif change is None:
        del found[part]
    else:
        found[part] = change
    (tmp_path / "a.json").write_text(json.dumps(found))
    register_coco_instances("wrong", tmp_path / "a.json", tmp_path)
    with pytest.raises(DatasetError, match=told):
        _ = CATALOG.get("wrong").annotations


def test_targets_are_the_files(root: Path, cfg: Config) -> None:
    cfg.INPUT.FLIP = "none"
    dataset = DetectionDataset(CATALOG.get("coco_2017_train"), cfg, train=True, masks=True)
    assert len(dataset) == 16
    described = CATALOG.get("coco_2017_train").annotations
    image, target = dataset[1]
    own = [a for a in described["annotations"] if a["image_id"] == 2]
    assert image.shape == (3, 64, 80) and image.dtype == torch.float32 and 0 <= image.min() < image.max() <= 1
    assert target["labels"].tolist() == [{3: 1, 7: 2}[a["category_id"]] for a in own]
    for box, mask, annotation in zip(target["boxes"].tolist(), target["masks"], own, strict=True):
        x, y, w, h = annotation["bbox"]
        assert box == [x, y, x + w, y + h]
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.1)
        rows, columns = mask.nonzero(as_tuple=True)
        assert (columns.min(), rows.min()) == (pytest.approx(x, abs=1), pytest.approx(y, abs=1))
    assert type(target["boxes"]) is torch.Tensor and type(image) is torch.Tensor
    test = DetectionDataset(CATALOG.get("coco_2017_val"), cfg, train=False, masks=False)
    assert test[0][1]["boxes"].shape == (0, 4)


def test_images_are_resized_with_their_boxes(cfg: Config) -> None:
    cfg.INPUT.FLIP = "none"
    plain = DetectionDataset(CATALOG.get("coco_2017_train"), cfg, train=True, masks=True)[0]
    cfg.INPUT.MIN_SIZE_TRAIN = [32]
    image, target = DetectionDataset(CATALOG.get("coco_2017_train"), cfg, train=True, masks=True)[0]
    assert image.shape == (3, 32, 32)
    assert target["size"] == (64, 64)
    torch.testing.assert_close(target["boxes"], plain[1]["boxes"] / 2)
    batch = collate([plain]).resized(0.5)
    assert batch.images[0].shape == (3, 32, 32)
    torch.testing.assert_close(batch.targets[0]["boxes"], plain[1]["boxes"] / 2)
    assert batch.targets[0]["masks"].shape[1:] == (32, 32)
    assert len(batch) == 1 and batch.nbytes == sum(
        t.numel() * t.element_size()
        for t in (*batch.images, *(batch.targets[0][k] for k in ("boxes", "labels", "masks")))
    )


def test_flipped_boxes_stay_around_their_masks(cfg: Config) -> None:
    cfg.INPUT.FLIP = "both"
    dataset = DetectionDataset(CATALOG.get("coco_2017_train"), cfg, train=True, masks=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for i in range(8):
            _, target = dataset[i]
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                rows, columns = mask.nonzero(as_tuple=True)
                around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (around - box).abs().max() <= 1


def test_images_are_held_out_once(cfg: Config) -> None:
    cfg.COCKTAIL.HELD_OUT = 5
    loaders = train_loaders(CATALOG.get("coco_2017_train"), cfg, False)
    held = {t["image_id"] for batch in loaders.held_out or () for t in batch.targets}
    trained = {t["image_id"] for batch in loaders.train for t in batch.targets}
    assert len(held) == 5 and not held & trained
    cfg.COCKTAIL.HELD_OUT = 14
    with pytest.raises(DatasetError, match="too few for COCKTAIL.HELD_OUT=14"):
        train_loaders(CATALOG.get("coco_2017_train"), cfg, False)


def test_what_is_missing_in_a_data_set_is_said(root: Path, cfg: Config, tmp_path: Path) -> None:
    boxes = shapes(2, 0)[1]
    for annotation in boxes["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    register_coco_instances("boxes", tmp_path / "boxes.json", tmp_path)
    with pytest.raises(DatasetError, match="has boxes only"):
        DetectionDataset(CATALOG.get("boxes"), cfg, train=True, masks=True)
    with pytest.raises(DatasetError, match="000000000001.png of .* cannot be read"):
        _ = DetectionDataset(CATALOG.get("boxes"), cfg, train=True, masks=False)[0]
    boxes["images"][0]["width"] = 999
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    register_coco_instances("boxes", tmp_path / "boxes.json", root / "coco" / "train2017")
    with pytest.raises(DatasetError, match="is 64 x 64, its annotations are for 999 x 64"):
        _ = DetectionDataset(CATALOG.get("boxes"), cfg, train=True, masks=False)[0]


def test_pascal_voc(tmp_path: Path, cfg: Config) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    pictures, _ = shapes(2, 0)
    thing = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>5</ymin><xmax>20</xmax>"
    thing += "<ymax>30</ymax></bndbox></object>"
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "JPEGImages" / f"00000{i}.jpg")
        size = f"<size><width>{picture.width}</width><height>{picture.height}</height><depth>3</depth></size>"
        objects = thing.format("dog", 0, 3) + thing.format("cat", 1, 4)
        text = f"<annotation><filename>00000{i}.jpg</filename>{size}{objects}</annotation>"
        (tmp_path / "Annotations" / f"00000{i}.xml").write_text(text)
    (tmp_path / "ImageSets" / "Main" / "trainval.txt").write_text("000000\n000001\n")
    register_pascal_voc("voc", tmp_path, "trainval")
    found = CATALOG.get("voc")
    assert len(found.classes) == 20
    assert [a["bbox"] for a in found.annotations["annotations"][:2]] == [[2, 4, 18, 26], [3, 4, 17, 26]]
    assert [a["iscrowd"] for a in found.annotations["annotations"]] == [0, 1, 0, 1]
    _, target = DetectionDataset(found, cfg, train=True, masks=False)[0]
    assert target["labels"].tolist() == [12]  # the difficult cat is not learned
    register_pascal_voc("voc", tmp_path, "trainval", ("dog",))
    with pytest.raises(DatasetError, match="an object is a 'cat'"):
        _ = CATALOG.get("voc").annotations


@pytest.mark.data
def test_the_small_real_sets(data_folder: Path, cfg: Config) -> None:
    if not (data_folder / "bccd").is_dir() or not (data_folder / "nuclei_dsb2018").is_dir():
        pytest.skip(f"{data_folder} holds no bccd or no nuclei_dsb2018")
    register_builtin()
    counts = [len(CATALOG.get(f"bccd_{s}").annotations["images"]) for s in ("train", "val", "test")]
    assert counts == [205, 87, 72]
    assert list(CATALOG.get("bccd_train").classes.values()) == ["RBC", "WBC", "Platelets"]
    nuclei = CATALOG.get("nuclei_test")
    assert len(nuclei.annotations["images"]) == 108
    image, target = DetectionDataset(nuclei, cfg, train=True, masks=True)[0]
    assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
    mini = CATALOG.get("coco_mini_val")
    assert len(mini.annotations["images"]) == 27 and len(mini.classes) == 80


# --------------------------------------------------------------------------------------- figures and pictures


def truth_as_results(dataset: Any, share: float = 1.0) -> list[dict[str, Any]]:
    """What is there, as a detector would find it in images of other sides."""
    cats, out = list(dataset.classes), []
    from cocktail_detection.data import decode

    for image in dataset.annotations["images"]:
        own = [a for a in dataset.annotations["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        shown = [round(image["height"] * share), round(image["width"] * share)]
        masks = torch.stack([torch.from_numpy(decode(a, image["height"], image["width"])) for a in own])[
            :, None
        ].float()
        masks = torch.nn.functional.interpolate(masks, shown, mode="bilinear")
        labels = torch.tensor([cats.index(a["category_id"]) + 1 for a in own])
        found = {"boxes": boxes * share, "labels": labels, "scores": torch.full((len(own),), 0.9), "masks": masks}
        target = {"image_id": image["id"], "size": (image["height"], image["width"])}
        out += results_of(found, shown, target, cats)
    return out


def test_coco_figures(root: Path) -> None:
    register_builtin(root)
    dataset = CATALOG.get("coco_2017_val")
    ids = [image["id"] for image in dataset.annotations["images"]]
    perfect = coco_metrics(dataset, ids, truth_as_results(dataset), ("bbox", "segm"))
    assert perfect["bbox"]["AP"] == pytest.approx(100) and perfect["segm"]["AP"] == pytest.approx(100)
    assert math.isnan(perfect["bbox"]["APl"])  # there are no large ones
    double = coco_metrics(dataset, ids, truth_as_results(dataset, 2.0), ("bbox", "segm"))
    assert double["bbox"]["AP"] == pytest.approx(100) and double["segm"]["AP"] > 95
    half = coco_metrics(dataset, ids, [r for r in truth_as_results(dataset) if r["category_id"] == 3], ("bbox",))
    assert half["bbox"]["AP"] == pytest.approx(50)
    assert coco_metrics(dataset, ids, [], ("bbox",))["bbox"]["AP"] == 0
    assert "area" in dataset.annotations["annotations"][0] and "score" not in dataset.annotations["annotations"][0]


def test_scores_of_single_images() -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]), "labels": torch.tensor([1, 2])}
    right = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.tensor([0.9, 0.8])}
    wrong = {**right, "labels": torch.tensor([2, 1])}
    one = {k: v[:1] for k, v in right.items()}
    noisy = {
        "boxes": torch.cat([target["boxes"], torch.tensor([[0.0, 50, 10, 60]])]),
        "labels": torch.tensor([1, 2, 1]),
        "scores": torch.tensor([0.5, 0.4, 0.9]),
    }
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    found = image_precisions([right, wrong, one, noisy], [target] * 4)
    assert found.tolist() == pytest.approx([1, 0, 0.5, 2 / 3])  # precisions 1/2, 2/3: the best at that recall or higher
    assert image_precisions([empty(), right, empty()], [nothing, nothing, target]).tolist() == [1, 0, 0]
    twice = {k: torch.cat([v[:1], v[:1]]) for k, v in right.items()}
    assert image_precisions([twice], [target]).tolist() == pytest.approx([0.5])  # a second hit on one box is none


def test_distillation_compares_what_compares() -> None:
    torch.manual_seed(0)
    maps, logits = [torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)], [torch.randn(2, 3, 8, 8)]
    teacher = Losses({}, maps, logits)
    same = DenseTeacher()(teacher, teacher)
    assert same["features"] == 0 and same["logits"] > 0
    student = Losses({}, [m.clone().requires_grad_() for m in maps], [torch.zeros(2, 3, 8, 8)])
    parts = DenseTeacher(features=2.0)(Losses({}, [m * 0 for m in maps], student.logits), teacher)
    assert parts["features"] == pytest.approx(2.0)
    assert parts["logits"] > same["logits"]
    smaller = Losses({}, [torch.randn(2, 4, 6, 6), torch.randn(2, 4, 3, 3)], [torch.zeros(2, 3, 6, 6)])
    assert set(DenseTeacher()(smaller, teacher)) == {"features"}
    classes = Losses({}, maps, [torch.randn(2, 5, 4)])
    assert DenseTeacher(softmax=True)(classes, classes)["logits"] > 0


def test_distillation_is_added_to_the_labels_loss() -> None:
    """The trainer mixes the two with shares that add up to 1; what the labels say counts whole all the same."""
    maps, losses = [torch.ones(1, 2, 4, 4)], {"boxes": torch.tensor(3.0), "classes": torch.tensor(2.0)}
    parts = DenseTeacher()(Losses(losses, [maps[0] * 2], []), Losses({}, maps, []))
    weight, labels = 0.25, sum(losses.values())
    total = (1 - weight) * labels + weight * sum(parts.values())
    assert total == pytest.approx(float(labels) + weight * 1.0)  # the maps are one apart, as a share of the teacher's


def test_detections_are_drawn_side_by_side(tmp_path: Path) -> None:
    from PIL import Image

    image = torch.full((3, 48, 64), 0.5)
    masks = torch.zeros(2, 1, 48, 64)
    masks[0, 0, 10:20, 10:30] = 1
    found = {
        "boxes": torch.tensor([[10.0, 10, 30, 20], [5, 5, 5, 9]]),  # the second has no width
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": masks,
    }
    picture = drawn(image, found, ["square", "circle"], 0.5)
    assert picture.dtype == torch.uint8 and (picture != 127).any()
    assert (drawn(image, found, ["square", "circle"], 0.95) == 127).all()
    assert (drawn(image, empty(), ["square"], 0.5) == 127).all()
    write_comparison(tmp_path / "there" / "d.png", [[picture] * 3, [picture] * 3], ["dense", "2:4", "channel@0.5"])
    with Image.open(tmp_path / "there" / "d.png") as png:
        assert png.width > 2 * png.height * 0.5
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["d.png"]


def test_three_networks_are_shown_beside_the_dense_one() -> None:
    names = ["dense", "unstructured@0.2", "unstructured@0.36", "unstructured@0.488", "1:2", "2:4", "4:8"]
    names += ["channel@0.1", "channel@0.19", "channel@0.271"]
    assert chosen_networks(names, []) == ["dense", "unstructured@0.36", "2:4", "channel@0.19"]
    assert len(chosen_networks(names[7:], [])) == 4
    assert chosen_networks(names, ["2:4"]) == ["dense", "2:4"]


def test_gaps_are_of_the_mean_channel_network() -> None:
    metrics = {
        "dense": {"bbox": {"AP": 30.0}},
        "channel@0.1": {"bbox": {"AP": 29.0}},
        "channel@0.2": {"bbox": {"AP": 28.0}},
    }
    assert summary(metrics) == ["box AP: dense 30.0, mean of 2 channel networks 28.5, gap 1.5"]
    assert json.dumps(jsonable({"AP": float("nan"), "AP50": 1.0})) == '{"AP": null, "AP50": 1.0}'


def test_batches_go_to_a_device() -> None:
    batch = DetectionBatch([torch.zeros(3, 4, 4)], [{"boxes": torch.zeros(1, 4), "image_id": 3}])
    moved = batch.to(torch.device("meta"))
    assert moved.images[0].is_meta and moved.targets[0]["boxes"].is_meta and moved.targets[0]["image_id"] == 3


# ------------------------------------------------------------------------------------------ the benchmark


def test_lines_have_gaps_beside_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent.parent / "benchmarks"))
    from detection_rows import lines, paper_gap, read, write

    def row(method: str, seed: int, dense: float, channel: float) -> dict[str, Any]:
        figures = {"dense": dense, "channel@0.1": channel + 1, "channel@0.19": channel - 1, "2:4": 9.0}
        networks = {n: {"bbox": {"AP": v, "AP50": 2 * v}} for n, v in figures.items()}
        found = {"task": "bccd", "method": method, "seed": seed, "budget": 60, "steps": 60, "passes": 240}
        return {**found, "seconds": 60.0, "networks": networks}

    write([row("mutualnet", 0, 30, 25), row("cocktail", 0, 30, 28), row("cocktail", 1, 32, 28)], tmp_path / "d.json")
    ours, rival = lines(read(tmp_path / "d.json"))
    assert (ours.method, ours.seeds, ours.dense, ours.dense50, ours.gap) == ("cocktail", 2, 31, 62, 3)
    assert ours.spread == pytest.approx(2**0.5) and ours.means == {"unstructured": None, "n:m": 9, "channel": 28}
    assert (rival.method, rival.gap, rival.spread) == ("mutualnet", 5, None)
    gaps = {(k, b, m): paper_gap(k, b, m) for k in ("bbox", "segm") for b in ("ResNet-50", "VGG-16") for m in METHODS}
    assert [gaps[k, b, "cocktail"] for k, b in PLACES] == [1.1, 1.5, 1.6, 1.0]
    assert [gaps[k, b, "mutualnet"] for k, b in PLACES] == [0.8, 3.1, 2.4, 1.9]
    assert paper_gap("bbox", "VGG-16", "cocktail, distillation") is None


METHODS = ("cocktail", "mutualnet")
PLACES = [("bbox", "ResNet-50"), ("bbox", "VGG-16"), ("segm", "ResNet-50"), ("segm", "VGG-16")]
