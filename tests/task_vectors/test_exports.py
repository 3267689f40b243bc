"""A checkpoint goes through extract, merge and export and is loaded again by its own library."""

import errno
import fcntl
import os
import resource
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import talos
from talos import Mask, Patch, TaskVector
from talos.errors import TalosError, TalosOSError, TalosTypeError, TalosValueError
from talos.files import Checkpoint
from tests.cases import assert_bit_equal
from tests.tiny_models import CLIP, save_tiny_clip

INDEX = "model.safetensors.index.json"


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def clip() -> nn.Module:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return CLIPModel(
        CLIPConfig(
            text_config={**small, "num_attention_heads": 2, "vocab_size": 40},
            vision_config={
                **small,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            projection_dim=8,
        )
    )


IDS = torch.arange(12).reshape(2, 6) % 37 + 3
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (llama, {"input_ids": IDS}),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}),
    "clip": (clip, {"input_ids": IDS, "pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}),
}


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    cast = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    with torch.no_grad():
        out = model.eval()(**cast)
    return out.logits_per_image if hasattr(out, "logits_per_image") else out.logits


def moved(model: nn.Module, seed: int) -> nn.Module:
    """Changes a part of every weight."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            steps = torch.randn(param.shape, generator=draw) * 0.05
            steps[torch.rand(param.shape, generator=draw) < 0.7] = 0
            param.add_(steps.to(param.dtype))
    return model


def save_small_shards(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="8kB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_extract_merge_and_export_give_the_model_edited_in_memory(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    make, inputs = MODELS[name]
    base = make().to(dtype)
    kind = type(base)
    folder = save_small_shards(base, tmp_path / "base")
    vectors = []
    for seed in (1, 2):
        tuned = moved(kind.from_pretrained(folder, dtype="auto"), seed)
        save_small_shards(tuned, tmp_path / f"tuned{seed}")
        vectors.append(TaskVector.from_models(folder, tmp_path / f"tuned{seed}", "changed"))
        in_memory = TaskVector.from_models(
            kind.from_pretrained(folder, dtype="auto"), tuned, "changed"
        )
        assert in_memory.mask == vectors[-1].mask
        for each in in_memory.mask.names:
            assert_bit_equal(in_memory.to_dense(each), vectors[-1].to_dense(each))
        assert 0.2 < vectors[-1].mask.density < 0.35
    edit = talos.merge(vectors, method="ties", density=0.5)
    if dtype == torch.bfloat16:
        edit = 0.6 * vectors[0] - 0.3 * vectors[1]
    edit.export(folder, tmp_path / "out", scale=0.5)
    edited = kind.from_pretrained(folder, dtype="auto")
    edit.apply_(edited, scale=0.5)
    loaded, report = kind.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert next(loaded.parameters()).dtype == dtype
    for each, param in edited.state_dict().items():
        assert_bit_equal(loaded.state_dict()[each], param)
    wanted = logits_of(edited, inputs)
    assert_bit_equal(logits_of(loaded, inputs), wanted)
    assert not torch.equal(wanted, logits_of(kind.from_pretrained(folder, dtype="auto"), inputs))
    for file in folder.iterdir():  # the same files, names, order, metadata, index
        other = tmp_path / "out" / file.name
        if file.suffix != ".safetensors":
            assert other.read_bytes() == file.read_bytes()
            continue
        length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert other.read_bytes()[:length] == file.read_bytes()[:length]
        assert other.stat().st_size == file.stat().st_size
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        f.name for f in folder.iterdir()
    }
    assert sorted(each.name for each in tmp_path.iterdir()) == ["base", "out", "tuned1", "tuned2"]


def test_a_file_of_open_clip(tmp_path: Path) -> None:
    base = save_tiny_clip(tmp_path / "clip")
    model = open_clip.create_model(CLIP, pretrained=str(base))
    tuned = {name: each.clone() for name, each in load_file(base).items()}
    tuned["visual.conv1.weight"] += 0.25
    save_file(tuned, tmp_path / "tuned.safetensors")
    vector = TaskVector.from_models(base, tmp_path / "tuned.safetensors", "changed")
    assert vector.mask.nnz == tuned["visual.conv1.weight"].numel()
    vector.export(base, tmp_path / "out.safetensors", scale=2.0)
    vector.apply_(model, scale=2.0)
    loaded = open_clip.create_model(CLIP, pretrained=str(tmp_path / "out.safetensors"))
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        assert_bit_equal(loaded.encode_image(images), model.encode_image(images))


# A small base in two shards, and a vector for it

SHAPES = {"model.a.weight": (8, 4), "model.b.weight": (6,), "model.c.weight": (3, 5)}
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors_of(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def save_base(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    names = list(tensors)
    folder.mkdir()
    for file, own in zip(FILES, (names[:2], names[2:]), strict=True):
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    placed = ",".join(f'"{name}":"{FILES[i // 2]}"' for i, name in enumerate(names))
    (folder / INDEX).write_text(f'{{"weight_map":{{{placed}}}}}')
    (folder / "config.json").write_text("{}")
    return folder


def vector_for(tensors: dict[str, torch.Tensor], density: float = 0.5) -> TaskVector:
    """A vector that belongs to these weights."""
    mask = Mask.from_dense(
        {name: torch.rand(each.shape) < density for name, each in tensors.items()}
    )
    tuned = {name: each.clone() for name, each in tensors.items()}
    for name, each in tuned.items():
        each[mask.to_dense(name)] += 1
    return TaskVector.from_models(tensors, tuned, mask)


def added(tensors: dict[str, torch.Tensor], vector: TaskVector) -> dict[str, torch.Tensor]:
    return {
        name: (each.float() + vector.to_dense(name)).to(each.dtype)
        for name, each in tensors.items()
    }


def assert_holds(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = Checkpoint(path)
    assert set(found) == set(wanted)
    for name, each in wanted.items():
        assert_bit_equal(found[name], each)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", tensors_of())


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", ["folder", "file", "replaced"])
def test_a_disk_that_is_full_at_any_byte_leaves_nothing(tmp_path: Path, form: str) -> None:
    tensors = tensors_of()
    base, out = save_base(tmp_path / "base", tensors), tmp_path / "out"
    if form == "file":
        base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
        save_file(tensors, base)
    vector = vector_for(tensors)
    if form == "replaced":
        vector.export(base, out)
    before = sorted(tmp_path.rglob("*"))
    largest = max(path.stat().st_size for path in ([base] if form == "file" else base.iterdir()))
    for size in {*range(0, largest, 13), largest - 1}:
        with (
            file_size_limit(size),
            pytest.raises(TalosOSError, match=r"path must be writable, got .*out"),
        ):
            vector.export(base, out, scale=2.0, overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before
    if form == "replaced":
        assert_holds(out, added(tensors, vector))
    vector.export(base, out, overwrite=True)
    assert_holds(out, added(tensors, vector))


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_failing_call_leaves_nothing(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    vector = vector_for(dict(Checkpoint(base)))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    owner = os if call == "fsync" else Path
    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(TalosOSError, match="writable"):
        vector.export(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, base: Path) -> None:
    tensors = dict(Checkpoint(base))
    vector, out = vector_for(tensors), tmp_path / "out"

    def die(done: int, total: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():  # Python 3.12 warns of threads, which the child does not use
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        vector.export(base, out, on_tensor=die)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.glob(".talos-*"))) == 1
    own = tmp_path / ".talos-notes"  # of a user
    own.mkdir()
    other = tmp_path / ".talos-of-a-living-writer.tmp"
    other.mkdir()
    descriptor = os.open(other, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    vector.export(base, out)
    assert_holds(out, added(tensors, vector))
    assert sorted(tmp_path.glob(".talos-*")) == [own, other]
    os.close(descriptor)
    vector.export(base, out, overwrite=True)
    assert list(tmp_path.glob(".talos-*")) == [own]


def test_tensors_are_held_one_at_a_time(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extraction holds two, export one, whatever the number of tensors."""
    living, peaks = weakref.WeakSet(), []
    read = Checkpoint.__getitem__

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        tensor = read(self, name)
        living.add(tensor)
        peaks.append(len(living))
        return tensor

    monkeypatch.setattr(Checkpoint, "__getitem__", counted)
    tensors = dict(Checkpoint(base))
    vector = vector_for(tensors)
    tensors.clear()
    peaks.clear()
    vector.export(base, tmp_path / "out")
    assert peaks == [1] * len(SHAPES)
    for mask in (None, vector.mask, "changed"):
        peaks.clear()
        found = TaskVector.from_models(base, tmp_path / "out", mask)
        assert found.mask == vector.mask or mask is None
        assert len(peaks) == 2 * len(SHAPES)
        assert max(peaks) == 2


def test_tensors_of_one_shape_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of an edited tensor is looked for in the first rows alone."""
    tensors = {f"{i}.w": torch.randn(5, 4) for i in range(6)}
    save_file(tensors, tmp_path / "base.safetensors")
    mask = Mask.from_dense({f"{i}.w": torch.ones(5, 4) > 0 for i in range(3)})
    read, names = Checkpoint.__getitem__, []

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "__getitem__", counted)
    vector = TaskVector(mask, torch.ones(mask.nnz))
    vector.export(tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    assert sorted(names) == sorted(tensors)


# Which base


def test_another_base_is_refused_and_nothing_is_written(tmp_path: Path, base: Path) -> None:
    tensors = dict(Checkpoint(base))
    vector = vector_for(tensors)
    tensors["model.c.weight"][0, 0] += 1
    other = save_base(tmp_path / "other", tensors)
    with pytest.raises(
        TalosValueError, match=r"base must be the base that .* got model\.c\.weight"
    ):
        vector.export(other, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]
    vector.export(other, tmp_path / "out", force=True)
    assert_holds(tmp_path / "out", added(tensors, vector))


def test_a_vector_of_the_base_in_float32_is_put_on_16_bits(tmp_path: Path) -> None:
    tensors = tensors_of(torch.bfloat16)
    base = save_base(tmp_path / "base", tensors)
    vector = vector_for({name: each.float() for name, each in tensors.items()})
    vector.export(base, tmp_path / "out")
    assert_holds(tmp_path / "out", added(tensors, vector))
    patched = dict(Checkpoint(base))
    Patch.between(Checkpoint(base), vector).apply_(patched)
    for name, each in added(tensors, vector).items():
        assert_bit_equal(patched[name], each)
    other = vector_for({name: each.float() + 1e-4 for name, each in tensors.items()})
    with pytest.raises(TalosValueError, match="base must be the base"):
        other.export(base, tmp_path / "more")


def test_an_edit_that_would_overflow_leaves_nothing(tmp_path: Path) -> None:
    tensors = {name: torch.full(shape, 6e4).half() for name, shape in SHAPES.items()}
    base = save_base(tmp_path / "base", tensors)
    mask = Mask.from_dense({"model.c.weight": torch.ones(3, 5) > 0})
    vector = TaskVector(mask, torch.ones(15))
    with pytest.raises(TalosValueError, match="scale must keep every weight finite"):
        vector.export(base, tmp_path / "out", scale=1e5)
    with pytest.raises(TalosTypeError, match="scale must be a real number"):
        vector.export(base, tmp_path / "out", scale="1")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_quantised_weights_are_refused_where_they_are_edited(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "base.safetensors")
    masks = {name: {name: torch.ones(2) > 0} for name in tensors}
    vectors = {name: TaskVector(Mask.from_dense(m), torch.ones(2)) for name, m in masks.items()}
    with pytest.raises(TalosTypeError, match=r"got b of torch\.float8_e4m3fn"):
        vectors["b"].export(tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    vectors["a"].export(tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    assert_holds(tmp_path / "out.safetensors", {**tensors, "a": 2 * torch.ones(2)})


# Which names


@pytest.mark.parametrize(
    ("old", "new", "how"),
    [
        ("", "encoder.", "'encoder.' left out"),
        ("model.", "", "'model.' put before"),
        ("model.", "encoder.roberta.", "'encoder.roberta.' replaced by 'model.'"),
    ],
)
def test_names_that_differ_by_one_prefix_are_matched_and_named(
    tmp_path: Path, base: Path, old: str, new: str, how: str
) -> None:
    vector = vector_for(dict(Checkpoint(base)))
    other = vector.rename({f"^{old}": new} if old else {"^": new})
    with pytest.warns(UserWarning, match=how):
        other.export(base, tmp_path / "out")
    assert_holds(tmp_path / "out", added(dict(Checkpoint(base)), vector))
    wrapped = vector.rename({"^": "module._orig_mod."})
    wrapped.export(base, tmp_path / "out", overwrite=True)
    assert_holds(tmp_path / "out", added(dict(Checkpoint(base)), vector))


def test_a_base_model_s_vector_goes_into_the_model_with_a_head(tmp_path: Path) -> None:
    """As transformers loads it: `base_model_prefix` is put before the names."""
    model = llama()
    folder = save_small_shards(model, tmp_path / "base")
    body = LlamaModel.from_pretrained(folder)
    vector = TaskVector.from_models(body, moved(LlamaModel.from_pretrained(folder), 1), "changed")
    with pytest.warns(UserWarning, match=r"'model\.' put before"):
        vector.export(folder, tmp_path / "out")
    vector.apply_(body)
    loaded = LlamaModel.from_pretrained(tmp_path / "out")
    for name, param in body.state_dict().items():
        assert_bit_equal(loaded.state_dict()[name], param)


def test_a_copy_of_a_tied_weight_is_edited_too(tmp_path: Path) -> None:
    """Otherwise transformers would not tie the two, because they differ."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        file,
        {"format": "pt"},
    )
    mask = Mask.from_dense({"model.embed_tokens.weight": torch.rand(40, 16) > 0.5})
    vector = TaskVector(mask, torch.ones(mask.nnz))
    with pytest.warns(UserWarning, match=r"lm_head\.weight of the base is a copy of model\.embed"):
        vector.export(tmp_path / "base", tmp_path / "out")
    vector.apply_(model)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert_bit_equal(logits_of(loaded, MODELS["llama"][1]), logits_of(model, MODELS["llama"][1]))
    embedding = mask.to_dense("model.embed_tokens.weight")
    none = torch.zeros(40, 16) > 0  # the vector knows the copy, and leaves it
    both = Mask.from_dense({"model.embed_tokens.weight": embedding, "lm_head.weight": none})
    TaskVector(both, vector.values).export(tmp_path / "base", tmp_path / "untied")
    untied = Checkpoint(tmp_path / "untied")
    assert_bit_equal(untied["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_names_that_fit_nowhere_or_twice_are_refused(tmp_path: Path, base: Path) -> None:
    vector = vector_for(dict(Checkpoint(base)))
    out = tmp_path / "out"
    fused = vector.rename({"model.b.weight": "model.b_proj.weight"})
    with pytest.raises(
        TalosValueError, match=r"got 1 that it lacks: model\.b_proj.*nearest: .*use rename"
    ):
        fused.export(base, out)
    tensors = {f"{side}.{i}.w": torch.ones(2) for side in ("encoder", "decoder") for i in range(2)}
    save_file(tensors, tmp_path / "two.safetensors")
    half = TaskVector(Mask.from_dense({"0.w": torch.ones(2) > 0}), torch.ones(2))
    with pytest.raises(TalosValueError, match=r"fit several: .*'encoder\.'.*choose with rename"):
        half.export(tmp_path / "two.safetensors", out)
    layer = half.rename({"0.w": "encoder.2.w"})
    with pytest.raises(TalosValueError, match=r"lacks: encoder\.2\.w"):  # never another layer
        layer.export(tmp_path / "two.safetensors", out)
    long = TaskVector(Mask.from_dense({"encoder.0.w": torch.ones(3) > 0}), torch.ones(3))
    with pytest.raises(TalosValueError, match=r"got \(3,\) for encoder\.0\.w, which is \(2,\)"):
        long.export(tmp_path / "two.safetensors", out)
    assert not out.exists()


# Which files


def test_other_files_are_copied_but_no_other_weights(tmp_path: Path, base: Path) -> None:
    vector = vector_for(dict(Checkpoint(base)))
    others = {
        "tokenizer.json": b"{}",
        "1_Pooling/config.json": b"[]",
        "pytorch_model.bin": b"old",
        "pytorch_model.bin.index.json": b"old",
        "onnx/model.onnx": b"old",
        "open_clip_model.safetensors": b"old",
        ".git/HEAD": b"hidden",
    }
    for name, content in others.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    (base / "link.json").symlink_to("tokenizer.json")
    with pytest.warns(UserWarning, match=r"left out: .*onnx/model\.onnx"):
        vector.export(base, tmp_path / "out")
    found = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    copied = {"config.json", "tokenizer.json", "1_Pooling/config.json", "link.json"}
    assert found == {*FILES, INDEX, *copied}
    assert not (tmp_path / "out" / "link.json").is_symlink()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_bytes() == b"[]"


def test_links_are_followed_in_the_hub_s_cache_and_nowhere_else(tmp_path: Path) -> None:
    tensors = tensors_of()
    plain = save_base(tmp_path / "plain", tensors)
    cached = tmp_path / "models--a" / "snapshots" / "1"
    (tmp_path / "models--a" / "blobs").mkdir(parents=True)
    cached.mkdir(parents=True)
    for path in plain.iterdir():
        path.rename(tmp_path / "models--a" / "blobs" / path.name)
        (cached / path.name).symlink_to(f"../../blobs/{path.name}")
    vector = vector_for(tensors)
    vector.export(cached, tmp_path / "out")
    assert_holds(tmp_path / "out", added(tensors, vector))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (tmp_path / "secret").write_text("key")
    for target in ("secret", "models--a/blobs", "nowhere"):
        (cached / "more.json").symlink_to(tmp_path / target)
        with pytest.raises(TalosValueError, match=r"regular files of its own, got .*more\.json"):
            vector.export(cached, tmp_path / "again")
        (cached / "more.json").unlink()


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("out", "out must not exist, got .*overwrite=True"),
        ("base", "out must lie outside of base"),
        ("base/more", "out must lie outside of base"),
        (".", "out must lie outside of base"),
        ("nowhere/out", "writable, got .*nowhere/out"),
    ],
)
def test_a_place_that_is_taken_is_refused(
    tmp_path: Path, base: Path, place: str, match: str
) -> None:
    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    overwrite = place != "out"
    with pytest.raises(TalosError, match=match):
        vector_for(dict(Checkpoint(base))).export(base, tmp_path / place, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_of_two_writers_the_first_one_wins(tmp_path: Path, base: Path) -> None:
    tensors = dict(Checkpoint(base))
    vector, out = vector_for(tensors), tmp_path / "out"

    def other_writer(done: int, total: int) -> None:
        if done == total and not out.exists():
            vector.export(base, out)

    with pytest.raises(TalosOSError, match=r"path must be writable, got .*out"):
        vector.export(base, out, scale=2.0, on_tensor=other_writer)
    assert_holds(out, added(tensors, vector))


def test_overwriting_loses_no_other_file(tmp_path: Path, base: Path) -> None:
    tensors = dict(Checkpoint(base))
    vector, out = vector_for(tensors), tmp_path / "out"
    vector.export(base, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(TalosOSError, match=r"only files that are replaced, .*notes\.txt"):
        vector.export(base, out, overwrite=True)
    (out / "notes.txt").unlink()
    vector.export(base, out, scale=-1, overwrite=True)
    assert_holds(out, added(tensors, -vector))
    (tmp_path / "file").touch()
    with pytest.raises(TalosOSError, match="out must be a folder, got"):
        vector.export(base, tmp_path / "file", overwrite=True)


def test_other_files_are_written_beside_the_weights(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "base.safetensors")
    vector = TaskVector(Mask.from_dense({"w": torch.ones(3) > 0}), torch.ones(3))
    beside = {"own/a.json": lambda path: path.write_text("new")}
    for out, base in (("one", "base.safetensors"), ("two", "one")):  # a file, then a folder
        vector.export(tmp_path / base, tmp_path / out, beside=beside)
        assert (tmp_path / out / "own" / "a.json").read_text() == "new"
    assert Checkpoint(tmp_path / "two" / "model.safetensors")["w"].tolist() == [2, 2, 2]
    vector.export(tmp_path / "one", tmp_path / "two", beside=beside, overwrite=True)
    with pytest.raises(TalosOSError, match=r"with 1 others: own/a\.json"):
        vector.export(
            tmp_path / "base.safetensors",
            tmp_path / "two",
            beside={"b.json": lambda path: path.write_text("")},
            overwrite=True,
        )
