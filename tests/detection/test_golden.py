"""HTC and HTC++ from given backbone maps, against numbers of the original code: see tests/golden_numbers/README.md.

Both run without `jax.jit`: their many equal operations compile once, which takes a third of the time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.detection.golden import assert_close, assert_close_gradients, load
from umae_jax.detection import cascade, sampling
from umae_jax.detection.cascade import CascadeOptions, RoiHeads
from umae_jax.detection.detector import total_loss
from umae_jax.detection.fpn import Fpn
from umae_jax.detection.masks import paste
from umae_jax.detection.mmdet import from_mmdet, to_mmdet
from umae_jax.detection.rpn import Proposals, Rpn, RpnOptions
from umae_jax.detection.sampling import Sample
from umae_jax.detection.targets import Targets
from umae_jax.errors import UserError

CLASSES, WIDTH, HIDDEN = 5, 16, 24
RPN = RpnOptions(anchor_scale=4, samples=48, train_proposals=400, test_proposals=150)
_HTC = CascadeOptions(
    semantic_classes=7,
    box_convs=0,
    box_hidden=HIDDEN,
    box_loss="smooth_l1",
    samples=32,
    score_threshold=0.05,
    nms="hard",
    nms_threshold=0.5,
    detections=12,
)
OPTIONS = {
    "htc": _HTC,
    "htcpp": _HTC._replace(box_convs=4, box_loss="giou", nms="linear", nms_threshold=0.3),
}
OBJECTS, CROP = 4, 112
# Two activations of this stage of HTC++ lie within 7e-7 of zero, where rounding decides the slope of the ReLU.
KINK = "roi_head.bbox_head.1.shared_convs."


class Heads(nnx.Module):
    """A detector without its backbone."""

    def __init__(self, options, rngs):
        shared = {"dtype": jnp.float32, "rngs": rngs}
        self.fpn = Fpn((8, 16, 24, 32), WIDTH, **shared)
        self.rpn = Rpn(WIDTH, RPN, **shared)
        self.roi_heads = RoiHeads(WIDTH, CLASSES, options, **shared)


def nhwc(array):
    return jnp.asarray(array).transpose(0, 2, 3, 1)


def numbers(name, kind):
    return load(f"{name}_{kind}")


def abstract_heads(name):
    return nnx.split(nnx.eval_shape(lambda: Heads(OPTIONS[name], nnx.Rngs(0))))


def heads_of(name):
    graph, params = abstract_heads(name)
    tensors = {key[2:]: array for key, array in numbers(name, "params").items()}
    return graph, from_mmdet(params, tensors, name="golden")


def targets_of(train):
    """Return the annotations of both images, padded; masks are not used, see `recorded_masks`."""
    boxes, labels, valid = np.zeros((2, OBJECTS, 4), np.float32), np.zeros((2, OBJECTS), np.int32), []
    for image in (0, 1):
        count = len(train[f"in/gt_labels{image}"])
        boxes[image, :count], labels[image, :count] = train[f"in/gt_boxes{image}"], train[f"in/gt_labels{image}"]
        valid.append(np.arange(OBJECTS) < count)
    valid = jnp.asarray(np.stack(valid))
    masks = jnp.zeros((2, OBJECTS, CROP, CROP), jnp.uint8)
    semantic = jnp.asarray(train["in/sem"][:, 0])
    return Targets(jnp.asarray(boxes), jnp.asarray(labels), valid, masks, valid, semantic)


def recorded(places, samples, count):
    """Return samples with the recorded rows; `places[i]` maps a recorded row of image i to ours."""
    rows, positive, valid = (np.zeros((2, count), kind) for kind in (np.int32, bool, bool))
    for image, sample in enumerate(samples):
        chosen = np.concatenate([sample["pos"], sample["neg"]])
        rows[image, : len(chosen)] = places[image][chosen]
        positive[image, : len(sample["pos"])] = True
        valid[image, : len(chosen)] = True
    return Sample(*map(jnp.asarray, (rows, positive, valid)))


def part(arrays, prefix):
    return {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}


def samples_of(train):
    """Return the recorded samples in the order in which they are drawn: RPN, then boxes and masks of each stage."""
    samples = [part(train, f"rpn/samp{image}/") for image in (0, 1)]
    drawn = [recorded([np.flatnonzero(train[f"rpn/inside{image}"]) for image in (0, 1)], samples, RPN.samples)]
    slots = [np.arange(len(train[f"roi_in/boxes{image}"])) for image in (0, 1)]  # rows of the boxes of a stage
    for stage in range(3):
        for kind in ("box", "mask"):
            samples = [part(train, f"s{stage}/{kind}_samp{image}/") for image in (0, 1)]
            places = []
            for image in (0, 1):
                objects = len(train[f"in/gt_labels{image}"])
                places.append(np.concatenate([np.arange(objects), OBJECTS + slots[image]]))
            drawn.append(recorded(places, samples, 32))
            if kind == "box":  # the positive objects themselves leave the list
                dropped = [sample["pos_is_gt"].astype(bool) for sample in samples]
                slots = [np.delete(np.arange(32), np.flatnonzero(gone)) for gone in dropped]
    return drawn


def record(monkeypatch):
    """Record the RoIs and outputs of the heads of each stage, and the first features of the boxes."""
    outputs = {}
    features, boxes, masks = RoiHeads._roi_features, RoiHeads._predict_boxes, RoiHeads._predict_masks

    def record_features(self, maps, rois, side):
        x = features(self, maps, rois, side)
        outputs.setdefault(f"features {side}", x)
        outputs["rois"] = rois
        return x

    def record_boxes(self, head, maps, rois, valid, *, train):
        stage = sum(key.startswith("boxes") for key in outputs)
        outputs[f"boxes {stage}"] = rois, boxes(self, head, maps, rois, valid, train=train)
        return outputs[f"boxes {stage}"][1]

    def record_masks(self, x, stage):
        outputs[f"masks {stage}"] = outputs["rois"], masks(self, x, stage)
        return outputs[f"masks {stage}"][1]

    monkeypatch.setattr(RoiHeads, "_roi_features", record_features)
    monkeypatch.setattr(RoiHeads, "_predict_boxes", record_boxes)
    monkeypatch.setattr(RoiHeads, "_predict_masks", record_masks)
    return outputs


def flat(x):
    """Merge images and RoIs."""
    return x.reshape(-1, *x.shape[2:])


def compare_rois(name, ours, theirs):
    """Compare boxes [B, R, 4] with rows of image number and box; all places are used."""
    np.testing.assert_array_equal(np.repeat(np.arange(len(ours)), ours.shape[1]), theirs[:, 0])
    assert_close(name, flat(ours), theirs[:, 1:])


@pytest.mark.parametrize("name", OPTIONS)
def test_training(name, monkeypatch):
    train, gradients = numbers(name, "train"), numbers(name, "grads")
    graph, params = heads_of(name)
    targets, image_size = targets_of(train), jnp.asarray(train["in/img_shape"])
    maps = [nhwc(train[f"in/c{level}"]) for level in range(2, 6)]
    drawn, seen = samples_of(train), []

    def draw(keys, gt_index, candidates, *, count, max_positive):
        sample = drawn[len(seen)]
        assert sample.index.shape == (2, count)
        assert max_positive == (count // 2 if not seen else count // 4)
        seen.append((gt_index, candidates))
        return sample

    recorded_masks = []
    for stage in range(3):
        masks = np.zeros((2, 8, 28, 28), np.float32)
        masks[train[f"s{stage}/mask_rois"][:, 0].astype(int), np.arange(16) % 8] = train[f"s{stage}/mask_targets"]
        recorded_masks.append(jnp.asarray(masks))
    given = [jnp.asarray(masks) for masks in recorded_masks]
    monkeypatch.setattr(sampling, "sample_images", draw)
    monkeypatch.setattr(cascade, "target_masks", lambda targets, index, boxes: given.pop(0))
    proposals = [train[f"roi_in/boxes{image}"] for image in (0, 1)]
    shape = (2, max(map(len, proposals)))
    boxes, valid = np.zeros((*shape, 4), np.float32), np.zeros(shape, bool)
    for image, rows in enumerate(proposals):
        boxes[image, : len(rows)], valid[image, : len(rows)] = rows, True
    proposals = Proposals(jnp.asarray(boxes), jnp.zeros(shape), jnp.asarray(valid))

    outputs = record(monkeypatch)

    def loss(params, maps):
        model = nnx.merge(graph, params)
        pyramid = model.fpn(maps)
        predicted = model.rpn(pyramid)
        keys = jax.random.split(jax.random.key(0), 2)
        losses = model.rpn.losses(pyramid, *predicted, targets, image_size, keys)
        losses |= model.roi_heads.losses(pyramid, proposals, targets, image_size, keys)
        found = jax.jit(lambda predicted: model.rpn.propose(pyramid, *predicted, image_size, train=True))(predicted)
        statistics = nnx.state(model, nnx.BatchStat)
        return total_loss(losses), (losses, pyramid, predicted, found, list(seen), statistics, dict(outputs))

    compute = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (total, auxiliary), (grads, map_grads) = compute(params, maps)
    losses, pyramid, predicted, found, assigned, statistics, recorded_outputs = auxiliary

    for level, x in enumerate(pyramid, 2):
        assert_close(f"P{level}", x.transpose(0, 3, 1, 2), train[f"fpn/p{level}"])
    for level, (logits, deltas) in enumerate(zip(*predicted, strict=True)):
        rows, columns = train[f"rpn/cls{level}"].shape[2:]
        theirs = train[f"rpn/cls{level}"].transpose(0, 2, 3, 1).reshape(2, -1)
        assert_close(f"objectness {level}", logits, theirs)
        theirs = train[f"rpn/reg{level}"].reshape(2, 3, 4, rows, columns).transpose(0, 3, 4, 1, 2).reshape(2, -1, 4)
        assert_close(f"deltas {level}", deltas, theirs)
    for image in (0, 1):
        count = len(train[f"rpn/prop_boxes{image}"])
        assert_close(f"proposals {image}", found.boxes[image, :count], train[f"rpn/prop_boxes{image}"])
        assert_close(f"proposal scores {image}", found.scores[image, :count], train[f"rpn/prop_scores{image}"])
        inside = np.asarray(assigned[0][1][image])
        np.testing.assert_array_equal(inside, train[f"rpn/inside{image}"])
        np.testing.assert_array_equal(
            np.asarray(assigned[0][0][image])[inside], train[f"rpn/samp{image}/gt_inds"], err_msg="anchors"
        )
        for number, (gt_index, candidates) in enumerate(assigned[1:]):
            key = f"s{number // 2}/{('box', 'mask')[number % 2]}_samp{image}/gt_inds"
            ours = np.asarray(gt_index[image])[OBJECTS:][np.asarray(candidates[image])[OBJECTS:]]
            np.testing.assert_array_equal(ours, train[key], err_msg=key)

    for stage in range(3):
        boxes, (logits, deltas) = recorded_outputs[f"boxes {stage}"]
        compare_rois(f"RoIs {stage}", boxes, train[f"s{stage}/rois"])
        assert_close(f"logits {stage}", flat(logits), train[f"s{stage}/cls"])
        assert_close(f"deltas {stage}", flat(deltas), train[f"s{stage}/reg"])
        boxes, masks = recorded_outputs[f"masks {stage}"]
        compare_rois(f"mask RoIs {stage}", boxes, train[f"s{stage}/mask_rois"])
        assert_close(f"mask logits {stage}", flat(masks).transpose(0, 3, 1, 2), train[f"s{stage}/mask_logits"])
    features = flat(recorded_outputs["features 7"]).transpose(0, 3, 1, 2)
    assert_close("RoI features", features, train["s0/box_feats_fused"])

    names = {"rpn_class": "loss_rpn_cls", "rpn_box": "loss_rpn_bbox", "semantic": "loss_semantic_seg"}
    for stage in range(3):
        kinds = {"class": "loss_cls", "box": "loss_bbox", "mask": "loss_mask"}
        names |= {f"stage_{stage}_{ours}": f"s{stage}.{theirs}" for ours, theirs in kinds.items()}
        assert_close(f"accuracy {stage}", 100 * losses[f"stage_{stage}_accuracy"], train[f"loss/s{stage}.acc"])
    for ours, theirs in names.items():
        assert_close(ours, losses[ours], train[f"loss/{theirs}"], 1e-5)
    assert_close("total", total, train["loss/total"], 1e-5)

    for level, gradient in enumerate(map_grads, 2):
        assert_close_gradients(f"gradient of C{level}", gradient.transpose(0, 3, 1, 2), gradients[f"g/in/c{level}"])
    trained = to_mmdet(grads)
    expected = part(gradients, "g/")
    for key, theirs in expected.items():
        if not key.startswith("in/"):
            assert_close_gradients(f"gradient of {key}", trained[key], theirs, 3e-3 if key.startswith(KINK) else 1e-3)
    assert {key for key in trained if "running" not in key} == {key for key in expected if not key.startswith("in/")}
    after = part(gradients, "after/")
    if after:
        updated = to_mmdet(nnx.merge_state(params, statistics))
        for key, theirs in after.items():
            assert_close(key, updated[key], theirs)


@pytest.mark.parametrize("name", OPTIONS)
def test_inference(name):
    train, expected = numbers(name, "train"), numbers(name, "infer")
    graph, params = heads_of(name)
    image_size = jnp.asarray(train["in/img_shape"])

    def detect(params, maps):
        model = nnx.merge(graph, params)
        pyramid = model.fpn(maps)
        proposals = model.rpn.propose(pyramid, *model.rpn(pyramid), image_size, train=False)
        proposals = jax.tree.map(lambda x: x[:, :40], proposals)  # as many as the original kept
        boxes, logits = model.roi_heads.refine(model.roi_heads.features(pyramid), proposals, image_size)
        return proposals, boxes, logits, *model.roi_heads.detect(pyramid, proposals, image_size)

    maps = [nhwc(train[f"in/c{level}"]) for level in range(2, 6)]
    proposals, boxes, logits, found, masks = detect(params, maps)
    assert_close("masks", flat(masks), expected["mask_prob_ensemble"])
    for image in (0, 1):
        assert_close("proposals", proposals.boxes[image], expected[f"prop_boxes{image}"])
        assert_close("proposal scores", proposals.scores[image], expected[f"prop_scores{image}"])
        assert_close("boxes", boxes[image], expected[f"raw_boxes{image}"])
        assert_close("mean logits", logits[image], expected[f"mean_logits{image}"])
        assert_close("scores", jax.nn.softmax(logits[image]), expected[f"raw_scores{image}"])
        assert_close("detections", found.boxes[image], expected[f"det_boxes{image}"])
        assert_close("detection scores", found.scores[image], expected[f"det_scores{image}"])
        np.testing.assert_array_equal(found.labels[image], expected[f"det_labels{image}"])
        assert bool(found.valid[image].all())
        height, width = train["in/img_shape"][image]
        pasted = np.asarray(paste(masks[image], found.boxes[image], int(height), int(width)) >= 0.5)
        theirs = np.unpackbits(expected[f"det_masks_ensemble{image}"], axis=-1)[..., :width].astype(bool)
        print(f"pixels that differ: {(pasted != theirs).sum()} of {pasted.size}")
        assert (pasted != theirs).mean() < 1e-4


def test_tensors_that_do_not_fit_are_listed():
    _, params = abstract_heads("htc")
    tensors = {key[2:]: array for key, array in numbers("htc", "params").items()}
    tensors["neck.extra.weight"] = tensors.pop("rpn_head.rpn_cls.bias")
    tensors["rpn_head.rpn_reg.bias"] = np.zeros(3, np.float32)
    with pytest.raises(
        UserError, match=r"rpn_reg.bias is \[3\], not \[12\].*rpn_cls.bias is missing.*neck.extra.weight"
    ):
        from_mmdet(params, tensors, name="file")
