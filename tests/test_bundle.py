"""The saved classifier: what is written is what is read, and a damaged run is never another classifier."""

import os
from pathlib import Path

import numpy as np
import pytest

from probe import bundle
from probe.backbones import load_backbone
from probe.errors import CorruptError, InputError, MismatchError
from probe.heads import TrainedHead, make_head
from tests.checkpoints import write_tiny_clip

jax = pytest.importorskip("jax")


def save(out: Path, checkpoint: Path, *, hidden: tuple[int, ...] = (), copy: bool = False, **options) -> TrainedHead:
    backbone = load_backbone(str(checkpoint))
    params = make_head(3, hidden).init(jax.random.key(0), np.zeros((1, backbone.width)))["params"]
    # random_like: a zero kernel would hide a transposed or swapped one
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), params)
    head = TrainedHead(hidden=hidden, params=params)
    bundle.save(
        out,
        head=head,
        class_names=("a", "b", "ç <c>"),
        view="pooler",
        backbone=bundle.BackboneReference(
            name=backbone.name, revision=backbone.revision, fingerprint=backbone.fingerprint
        ),
        preprocessor_config=backbone.preprocessing.to_config(),
        backbone_copy=backbone if copy else None,
        config={"seed": 0},
        metrics={"splits": {}},
        files={"history.csv": b"epoch\n"},
        **options,
    )
    return head


@pytest.mark.parametrize("hidden", [(), (8, 4)])
def test_what_is_saved_is_loaded(hidden: tuple[int, ...], tiny_clip: Path, tmp_path: Path) -> None:
    head = save(tmp_path / "run", tiny_clip, hidden=hidden)
    loaded = bundle.load(tmp_path / "run")
    assert loaded.class_names == ("a", "b", "ç <c>")
    assert (loaded.view, loaded.finetuned, loaded.multi_label) == ("pooler", False, False)
    assert loaded.head.hidden == hidden
    jax.tree.map(np.testing.assert_array_equal, loaded.head.params, head.params)
    embeddings = np.random.default_rng(1).standard_normal((5, 16), np.float32)
    np.testing.assert_array_equal(loaded.head.apply(embeddings), head.apply(embeddings))


def test_a_bundled_backbone_needs_no_original(tmp_path: Path) -> None:
    checkpoint = write_tiny_clip(tmp_path / "clip")
    save(tmp_path / "run", checkpoint, copy=True)
    original = load_backbone(str(checkpoint))
    checkpoint.rename(tmp_path / "gone")
    copy = bundle.load(tmp_path / "run").load_backbone()
    assert copy.fingerprint == original.fingerprint
    jax.tree.map(np.testing.assert_array_equal, copy.variables, original.variables)


def test_a_backbone_that_has_moved_is_found_with_its_new_name_and_another_is_refused(tmp_path: Path) -> None:
    checkpoint = write_tiny_clip(tmp_path / "clip")
    save(tmp_path / "run", checkpoint)
    checkpoint.rename(tmp_path / "moved")
    loaded = bundle.load(tmp_path / "run")
    with pytest.raises(InputError, match="--backbone"):
        loaded.load_backbone()
    assert loaded.load_backbone(str(tmp_path / "moved")).fingerprint == loaded.backbone.fingerprint
    with pytest.raises(MismatchError, match="was trained on"):
        loaded.load_backbone(str(write_tiny_clip(tmp_path / "other", seed=1)))


def test_every_flipped_bit_and_missing_file_is_noticed(tiny_clip: Path, tmp_path: Path) -> None:
    save(tmp_path / "run", tiny_clip)
    for path in sorted((tmp_path / "run").iterdir()):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"damaged|missing|not in manifest"):
            bundle.load(tmp_path / "run")
        path.unlink()
        with pytest.raises(InputError if path.name == "manifest.json" else CorruptError, match=path.name):
            bundle.load(tmp_path / "run")
        path.write_bytes(whole)
    bundle.load(tmp_path / "run")


def test_all_faults_are_listed_at_once(tiny_clip: Path, tmp_path: Path) -> None:
    save(tmp_path / "run", tiny_clip)
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / "head.safetensors").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"head.safetensors is damaged; metrics.json is missing"):
        bundle.load(tmp_path / "run")


def test_overwrite_replaces_the_whole_run(tiny_clip: Path, tmp_path: Path) -> None:
    save(tmp_path / "run", tiny_clip, hidden=(8,), copy=True)
    with pytest.raises(InputError, match="--overwrite"):
        save(tmp_path / "run", tiny_clip)
    save(tmp_path / "run", tiny_clip, overwrite=True)
    assert bundle.load(tmp_path / "run").head.hidden == ()
    assert not (tmp_path / "run" / "backbone").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_overwrite_replaces_runs_and_nothing_else(tiny_clip: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(InputError, match=r"holds no classifier\.json"):
        save(tmp_path / "photos", tiny_clip, overwrite=True)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]


def test_a_backbone_that_was_replaced_is_not_bundled(tmp_path: Path) -> None:
    checkpoint = write_tiny_clip(tmp_path / "clip")
    found = load_backbone(str(checkpoint))
    reference = bundle.BackboneReference(name=found.name, revision=None, fingerprint=found.fingerprint)
    assert reference.load().fingerprint == found.fingerprint
    (checkpoint / "model.safetensors").write_bytes(
        (write_tiny_clip(tmp_path / "other", seed=1) / "model.safetensors").read_bytes()
    )
    with pytest.raises(MismatchError, match="was trained on"):
        reference.load()


def test_a_run_that_was_being_replaced_at_a_crash_is_found(tmp_path: Path, tiny_clip: Path, monkeypatch) -> None:
    head = save(tmp_path / "run", tiny_clip)

    def fail(source: Path, target: Path) -> None:
        if target == tmp_path / "run":
            raise SystemExit
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SystemExit):
        save(tmp_path / "run", tiny_clip, hidden=(8,), overwrite=True)
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
    found = bundle.load(tmp_path / "run").head
    assert found.hidden == ()
    np.testing.assert_array_equal(found.params["kernel"], head.params["kernel"])
