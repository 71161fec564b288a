"""Files are read without running anything; weights fit whole or are refused in words."""

import builtins
import importlib
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import vitft  # noqa: F401  (registers the names)
from vitft import fitting, tally, tensorfile, weights
from vitft.errors import WeightsError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model("vitflower_b16", **(TINY | {"num_classes": 5} | options))


def state_of(**options):
    return {k: v.clone() for k, v in tiny(**options).state_dict().items()}


def refused(id, call, text, *, place=None, fix=".", every=False):
    """The call fails with this fault: id, place, measured text, and a way out."""
    with pytest.raises(WeightsError) as caught:
        call()
    faults = [f for f in caught.value.faults if f.id == id]
    assert faults, caught.value
    assert every or len(caught.value.faults) == len(faults)
    fault = faults[0]
    assert caught.value.exit_code == 4
    if place is not None:
        assert str(place) in fault.place
    assert re.search(text, fault.text), fault.text
    assert re.search(fix, fault.fix), fault.fix
    return fault


def fill(model, state, place="checkpoint"):
    whole, match, notes = fitting.complete(state, model, place=place)
    model.load_state_dict(whole)
    return match, notes


# --- files that are not what they claim ----------------------------------------------------------


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def payloads(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Payload(os.system, f"touch {marker}"),
        "os.mkdir": Payload(os.mkdir, str(marker)),
        "subprocess.call": Payload(subprocess.call, ["touch", str(marker)]),
        "subprocess.Popen": Payload(subprocess.Popen, ["touch", str(marker)]),
        "builtins.eval": Payload(eval, touch),
        "builtins.exec": Payload(exec, touch),
        "builtins.open": Payload(builtins.open, str(marker), "w"),
        "importlib.import_module": Payload(importlib.import_module, "this"),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", payloads("x"))
def test_C1_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path, name, form):
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    content = {"w": torch.ones(3), "evil": payloads(marker)[name]}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"evil": content["evil"]}, protocol=4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    last = name.split(".")[-1]
    refused(
        "ckpt.code",
        lambda: weights.read(path),
        rf"would have to run code to be read: .*\.{last}",
        place=path,
        fix="save its state_dict\\(\\) with safetensors",
    )
    assert not marker.exists()


def test_C1_no_text_offers_an_unsafe_way_around(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"evil": Payload(os.system, "true")}, path)
    with pytest.raises(WeightsError) as caught:
        weights.read(path)
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)


def test_C2_an_unsafe_torch_opens_no_pickle_but_safetensors(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pth")
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(
        "ckpt.old_torch",
        lambda: weights.read(tmp_path / "w.pth"),
        r"torch 2\.9\.1\+cpu cannot open pickles safely",
        place=tmp_path / "w.pth",
        fix=r"install torch 2\.10",
    )
    assert weights.read(tmp_path / "w.safetensors")["w"].sum() == 3


@pytest.mark.parametrize("legacy", [False, True])
def test_C3_a_whole_pickled_module_is_named_as_such(tmp_path, legacy):
    path = tmp_path / "model.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=not legacy)
    refused(
        "ckpt.module",
        lambda: weights.read(path),
        r"holds a whole module, not weights \(.*torch\.nn\.modules\.linear\.Linear",
        place=path,
        fix=r"state_dict\(\)",
    )


def test_C4_a_torchscript_archive_is_named_without_a_bypass(tmp_path):
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    fault = refused("ckpt.torchscript", lambda: weights.read(path), "TorchScript", place=path)
    assert "weights_only" not in fault.fix
    assert "OpenAI's CLIP is on the hub as openai/clip-vit-base-patch32" in fault.fix


def saved(tmp_path, form):
    path = tmp_path / f"weights.{form}"
    tensors = {"a.weight": torch.arange(600.0), "b.bias": torch.ones(40)}
    if form == "safetensors":
        save_file(tensors, path)
    elif form == "npz":
        np.savez(path, **{k: v.numpy() for k, v in tensors.items()})
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "pth")
    return path


@pytest.mark.parametrize("form", ["pth", "legacy", "safetensors", "npz"])
def test_C5_a_truncated_file_is_refused_at_every_length(tmp_path, form):
    path = saved(tmp_path, form)
    data = path.read_bytes()
    assert len(weights.read(path)) == 2
    for length in sorted({1, 7, 8, 9, 60, len(data) // 2, len(data) - 200, len(data) - 1}):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError) as caught:
            weights.read(path)
        fault = caught.value.faults[0]
        assert fault.place == str(path)
        if length > 100:
            assert fault.id == "ckpt.truncated", (length, fault)
            assert "copy or download it again" in fault.fix
        if length > 100 and form != "legacy":
            assert f"{length:,} bytes" in fault.text


def test_C6_an_empty_file_is_called_empty(tmp_path):
    path = tmp_path / "weights.pth"
    path.touch()
    refused("ckpt.empty", lambda: weights.read(path), "has 0 bytes", place=path, fix="copy")


def test_C7_a_missing_file_and_a_folder_are_named_with_what_is_near(tmp_path):
    (tmp_path / "vit_base.pth").write_bytes(b"x")
    path = tmp_path / "vit_bsae.pth"
    refused(
        "ckpt.missing",
        lambda: weights.read(path),
        "no such file",
        place=path,
        fix=f"did you mean {tmp_path}/vit_base.pth",
    )
    refused("ckpt.missing", lambda: weights.read(Path("/no/where.pth")), "no such", fix="check")
    refused(
        "ckpt.directory",
        lambda: weights.read(tmp_path),
        "is a folder",
        place=tmp_path,
        fix="vit_base.pth",
    )
    os.mkfifo(tmp_path / "pipe.pth")
    refused("ckpt.not_regular", lambda: weights.read(tmp_path / "pipe.pth"), "pipe")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346284714\n"


@pytest.mark.parametrize(
    ("data", "id", "text", "fix"),
    [
        (LFS, "ckpt.lfs", "git-lfs pointer of a file of 346,284,714 bytes", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Log in", "ckpt.html", r"web page.*\(28 bytes\)", "browser"),
        (b"<html>404</html>", "ckpt.html", "web page", "open the address"),
        (b"Access denied\n", "ckpt.not_weights", "text file that begins 'Access denied", "PyTorch"),
        (b"\x89HDF\r\n\x1a\nrest", "ckpt.not_weights", "HDF5", "safetensors"),
        (b"\x1f\x8b\x08rest", "ckpt.not_weights", "gzip", "npz"),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07\xff\xfe", "ckpt.not_weights", "no kind of", "numpy"),
        (b"\x00" * 257 + b"ustar\x00" + b"\x00" * 300, "ckpt.not_weights", "a tar", "numpy"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "bin"])
def test_C8_what_is_no_weights_file_is_named(tmp_path, data, id, text, fix, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(data)
    refused(id, lambda: weights.read(path), text, place=path, fix=fix)


def test_C8_content_counts_and_a_false_suffix_is_mentioned(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.pth")
    torch.save({"w": torch.ones(3)}, tmp_path / "b.safetensors")
    for name, inside in (("a.pth", "safetensors"), ("b.safetensors", "PyTorch")):
        found = weights.open_file(tmp_path / name)
        assert found.tensors["w"].sum() == 3
        assert found.notes == (f"{name} is {inside} inside; the content counts, not the name",)
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as z:
        z.writestr("word/document.xml", "x")
    refused("ckpt.not_weights", lambda: weights.read(tmp_path / "c.pth"), "holds word/document.xml")


@pytest.mark.parametrize("form", ["pth", "npz"])
def test_C9_one_flipped_byte_in_a_zip_is_found_by_its_checksum(tmp_path, form):
    path = saved(tmp_path, form)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused("ckpt.corrupt", lambda: weights.read(path), "CRC|checksum", place=path, fix="copy")


def test_C9_a_promised_sha256_is_checked_by_name_and_by_argument(tmp_path):
    path = saved(tmp_path, "safetensors")
    digest = weights.open_file(path).sha256
    good = path.rename(tmp_path / f"vit-{digest[:8]}.safetensors")
    assert weights.read(good, sha256=digest.upper())
    assert weights.read(good, sha256=digest[:12])
    refused(
        "ckpt.sha256",
        lambda: weights.read(good, sha256="0" * 64),
        f"sha256 begins {digest}, the recipe promises {'0' * 64}",
        place=good,
        fix="recipe's sha256",
    )
    bad = good.rename(tmp_path / "vit-e5005f0a.safetensors")
    refused(
        "ckpt.sha256",
        lambda: weights.read(bad),
        f"sha256 begins {digest[:8]}, its name promises e5005f0a",
        place=bad,
        fix="download it again, or rename",
    )
    dated = bad.rename(tmp_path / "vit-20240131.safetensors")
    assert weights.read(dated)


def header_file(path, header, body=b"\0" * 16, *, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return path


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body", "id", "text"),
    [
        ({"a": F32}, b"\0" * 4, "ckpt.truncated", r"stops early: \d+ bytes of \d+"),
        ({"a": F32}, b"\0" * 12, "ckpt.header", "not describe the file"),
        (
            {"a": F32, "b": F32 | {"data_offsets": [4, 12]}},
            b"\0" * 12,
            "ckpt.header",
            "not describe the file",
        ),
        (b"{nonsense}", b"", "ckpt.header", "header is damaged"),
        (b'{"a": [1', b"", "ckpt.header", "header is damaged"),
        (b"[" * 100_000, b"", "ckpt.header", "header is damaged"),
        ({"a": F32 | {"dtype": "F99"}}, b"\0" * 8, "ckpt.header", "not describe"),
        ({"a": F32 | {"shape": [3]}}, b"\0" * 8, "ckpt.header", "not describe"),
        ({"a": 5}, b"\0" * 8, "ckpt.header", "not describe"),
    ],
)
def test_C10_a_broken_safetensors_file_is_refused_with_its_fault(tmp_path, header, body, id, text):
    path = header_file(tmp_path / "w.safetensors", header, body)
    refused(id, lambda: weights.read(path), text, place=path, fix="copy")


def test_C10_a_header_length_of_2_to_the_63_is_refused(tmp_path):
    path = header_file(tmp_path / "w.safetensors", {"a": F32}, length=2**63)
    refused("ckpt.header", lambda: weights.read(path), "9,223,372,036,854,775,808", place=path)


def test_C11_a_name_that_occurs_twice_is_refused(tmp_path):
    entry = json.dumps(F32)
    path = header_file(
        tmp_path / "w.safetensors", f'{{"a": {entry}, "a": {entry}}}'.encode(), b"\0" * 8
    )
    refused("ckpt.header", lambda: weights.read(path), "the name 'a' occurs twice", place=path)


def test_C12_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", 90 << 20) + b"{")
        f.truncate(100 << 20)  # sparse: takes no disk
    refused("ckpt.header", lambda: weights.read(path), "claims 94,371,840.*limit is 16,777,216")


def test_C13_zip_bombs_are_refused_by_the_sizes_they_declare(tmp_path):
    torch.save({"w": torch.zeros(30_000_000)}, tmp_path / "plain.pth")
    bomb = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros(30_000_000, np.float32))
    for path in (bomb, tmp_path / "bomb.npz"):
        size = path.stat().st_size
        assert size < 1_000_000
        refused(
            "ckpt.bomb",
            lambda path=path: weights.read(path),
            rf"{size:,} bytes would unpack to 120,\d+,\d+, the bound is {8 * size + 2**26:,}",
            place=path,
            fix="do not use",
        )


def test_C14_an_expanded_tensor_costs_its_stored_size_and_fails_by_shape(tmp_path):
    path = tmp_path / "w.pth"
    huge = torch.zeros(1).expand(20_000, 10_000)
    torch.save(state_of() | {"norm.weight": huge}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    tensors = weights.read(path)
    refused(
        "ckpt.shape",
        lambda: fitting.complete(tensors, tiny(), place=path),
        r"norm\.weight is \[20000, 10000\], the model has \[32\]",
        place=path,
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    overlapping = torch.zeros(400).as_strided((200, 200), (1, 1))
    torch.save({"w": overlapping}, path)
    refused("ckpt.kind", lambda: weights.read(path), "w is sparse, quantised, complex or overlaps")


def test_a_link_to_nowhere_is_not_called_near_to_itself(tmp_path):
    path = tmp_path / "w.pth"
    path.symlink_to("gone.pth")
    refused(
        "ckpt.missing", lambda: weights.read(path), "a link to gone.pth, where", fix="the file it"
    )


def test_a_run_folder_names_the_weights_in_it(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    call = lambda: weights.read(tmp_path)  # noqa: E731
    refused("ckpt.directory", call, "is a folder", fix="name one of its files: model/model.safet")


def test_what_is_no_weights_says_what_it_is(tmp_path):
    net = torch.nn.Linear(4, 3)
    moments = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    moments.step()
    cases = [(moments.state_dict(), "no tensors by name: it is the state of an optimizer")]
    cases += [({}, "no tensors by name: it is empty"), ({"a": 1}, "by name, only a$")]
    for content, text in cases:
        torch.save(content, tmp_path / "w.pth")
        refused("ckpt.no_tensors", lambda: weights.read(tmp_path / "w.pth"), text)
    np.savez(tmp_path / "w.npz", names=np.array(["daisy", "rose"]))
    text = "array 'names' holds texts or dates, not numbers"
    refused("ckpt.kind", lambda: weights.read(tmp_path / "w.npz"), text, fix="without it")


def test_quantised_weights_are_called_so_and_a_scrap_is_not_taken_for_a_kind():
    name = "blocks.0.attn.qkv.weight"
    own = tiny().state_dict()[name]
    half = {name: own.to(torch.int8)}
    scaled = half | {f"{name}_scale": torch.ones(1)}
    fault = refused("ckpt.architecture", lambda: fitting.complete(scaled, tiny()), "1 of the")
    assert fault.fix.startswith("the file is quantised")
    fault = refused("ckpt.architecture", lambda: fitting.complete(half, tiny()), "1 of the")
    assert fault.fix == "name the model that these weights belong to"


@pytest.mark.parametrize("name", ["base.blocks.0.qkv.lora_A.weight", "blocks.0.attn.qkv.lora_b"])
def test_adapters_without_their_model_are_called_so(name):
    fault = refused(
        "ckpt.architecture", lambda: fitting.complete({name: torch.zeros(3)}, tiny()), "0 of the"
    )
    assert fault.fix.startswith("looks like LoRA adapters, without the model they were made for")
    whole = tiny().state_dict() | {name: torch.zeros(3)}
    fix = "merge the LoRA adapters first"
    refused("ckpt.unexpected_keys", lambda: fitting.complete(whole, tiny()), "also holds", fix=fix)


# --- weights that do not belong ------------------------------------------------------------------


def test_C15_another_architecture_is_counted_and_guessed():
    resnet = {f"layer{i}.0.conv1.weight": torch.zeros(3) for i in range(1, 5)}
    fault = refused(
        "ckpt.architecture",
        lambda: fitting.complete(resnet, tiny(), place="r.pth"),
        r"0 of the model's 32 tensors are in the file; missing 30 tensors \(cls_token, pos_embed, "
        r"patch_embed\.proj\.weight, and 27 more\); unexpected 4 tensors \(layer1\.0\.conv1",
        place="r.pth",
        fix="looks like a ResNet; the model is a ViT",
    )
    assert len(fault.text) < 400


def test_C15_a_vit_of_another_size_is_told_by_its_size():
    refused(
        "ckpt.shape",
        lambda: fitting.complete(state_of(embed_dim=48), tiny()),
        r"cls_token is \[1, 1, 48\], the model has \[1, 1, 32\]",
        fix="ViT of 2 blocks of width 48; the model has 2 blocks of width 32",
    )
    refused(
        "ckpt.unexpected_keys",
        lambda: fitting.complete(state_of(depth=3), tiny()),
        r"also holds 12 tensors \(blocks\.2\.norm1\.weight",
        fix="3 blocks",
    )


def test_C16_misshapen_tensors_are_shown_in_both_shapes():
    state = state_of() | {"norm.bias": torch.zeros(7), "blocks.1.mlp.fc1.bias": torch.zeros(2, 2)}
    refused(
        "ckpt.shape",
        lambda: fitting.complete(state, tiny(), place="x.pth"),
        r"norm\.bias is \[7\], the model has \[32\].*fc1\.bias is \[2, 2\], the model has \[128\]"
        r"|fc1\.bias is \[2, 2\], the model has \[128\]; norm\.bias is \[7\]",
        place="x.pth",
    )


def test_C17_no_backbone_tensor_is_ever_missed_silently():
    whole = state_of()
    for name in whole:
        if not name.startswith("head."):
            refused(
                "ckpt.missing_keys",
                lambda name=name: fitting.complete(
                    {k: v for k, v in whole.items() if k != name}, tiny()
                ),
                f"lacks 1 tensor \\({name}\\)",
            )


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_C18_wrapper_prefixes_come_off_in_any_order(prefix):
    state = {prefix + k: v for k, v in state_of().items()}
    tensors, notes = weights.unwrap(state)
    assert list(tensors) == list(tiny().state_dict())
    assert len(notes) == prefix.count(".")
    assert all("took the prefix" in n for n in notes)


@pytest.mark.parametrize(
    "prefix", ["model.", "backbone.", "encoder.", "student.", "teacher.backbone.", "net.vit."]
)
def test_C19_other_prefixes_come_off_where_they_fit_best(prefix):
    state = {prefix + k: v for k, v in state_of().items()} | {"ema_decay": torch.tensor(0.9)}
    model = tiny()
    match, notes = fill(model, state)
    assert match.loaded == 32
    assert notes == (f"took the prefix {prefix!r} off the names",)
    assert match.dropped == {"ema_decay": f"outside {prefix}"}
    resnet = timm.create_model("resnet10t", num_classes=3)
    fitted = fitting.fit({prefix + k: v for k, v in resnet.state_dict().items()}, resnet)
    assert set(fitted.state) == set(resnet.state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "weights"])
def test_C20_usual_containers_are_opened_and_named(key):
    content = {"epoch": 3, key: state_of(), "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    tensors, notes = weights.unwrap(content)
    assert set(tensors) == set(tiny().state_dict())
    assert notes == (f"took '{key}' out of epoch, {key}, optimizer",)


def test_C20_two_containers_need_a_choice():
    content = {"model": state_of(), "net": state_of()}
    refused(
        "ckpt.ambiguous",
        lambda: weights.unwrap(content),
        "weights in model, net",
        fix="key='model'",
    )
    assert weights.unwrap(content, key="net")[0].keys() == state_of().keys()
    refused(
        "ckpt.key", lambda: weights.unwrap(content, key="x"), "no container 'x'", fix="model, net"
    )
    odd = {"generator": state_of(), "critic": state_of()}
    refused("ckpt.ambiguous", lambda: weights.unwrap(odd), "generator, critic")
    assert weights.unwrap({"generator": state_of()})[1] == ("took 'generator' out of generator",)
    refused("ckpt.no_tensors", lambda: weights.unwrap({"epoch": 1}), "only epoch")
    refused("ckpt.no_tensors", lambda: weights.unwrap([torch.ones(1)]), "holds a list")
    loop = {"epoch": 1}
    loop["model"] = loop
    refused("ckpt.no_tensors", lambda: weights.unwrap(loop), "only epoch, model")


def test_C21_averaged_weights_come_first_and_are_named():
    raw, averaged = state_of(), {k: v + 1 for k, v in state_of().items()}
    for key in ("state_dict_ema", "model_ema", "teacher"):
        content = {"state_dict": raw, key: averaged}
        tensors, notes = weights.unwrap(content)
        assert torch.equal(tensors["norm.bias"], averaged["norm.bias"])
        assert notes == (f"took '{key}' out of state_dict, {key}",)
        tensors, _ = weights.unwrap(content, ema=False)
        assert torch.equal(tensors["norm.bias"], raw["norm.bias"])
    tensors, _ = weights.unwrap({"student": raw, "teacher": averaged}, ema=False)
    assert torch.equal(tensors["norm.bias"], raw["norm.bias"])


def test_C22_an_average_that_is_only_a_number_is_no_container():
    content = {"state_dict": state_of(), "model_ema": 0.999, "ema": None}
    assert weights.unwrap(content)[1] == ("took 'state_dict' out of state_dict, model_ema, ema",)


def test_C23_a_head_for_other_classes_is_left_out_with_the_reason():
    match, _ = fill(tiny(), state_of(num_classes=9))
    assert match.dropped == dict.fromkeys(
        ("head.weight", "head.bias"), "it is for 9 classes, the model has 5"
    ) | {"head.bias": "it is for 9 classes (all zeros), the model has 5"}
    assert match.new == ("head.weight", "head.bias")
    assert match.loaded == 30
    state = state_of(num_classes=9)
    refused(
        "ckpt.shape",
        lambda: tally.check(state, tiny().state_dict(), place="resume"),
        r"head\.weight is \[9, 32\], the model has \[5, 32\]",
        place="resume",
    )


def test_C24_a_missing_head_stays_fresh_and_is_named():
    model = tiny()
    fresh = model.head.weight.clone()
    match, _ = fill(model, state_of(num_classes=0))
    assert match.new == ("head.weight", "head.bias")
    assert torch.equal(model.head.weight, fresh)


def test_a_patch_that_was_resampled_on_the_way_is_not_told_as_the_files_own():
    other = timm.create_model("vit_base_patch16_224", **(TINY | {"patch_size": 4, "embed_dim": 48}))
    with pytest.raises(WeightsError) as caught:
        fitting.complete(other.state_dict(), tiny())
    assert {fault.fix for fault in caught.value.faults} == {
        "the file is a ViT of 2 blocks of width 48; the model has 2 blocks of width 32; "
        "python -m vitft.weights inspect FILE names the model that fits"
    }


def test_C25_positions_of_another_grid_are_resampled_like_timms():
    other = timm.create_model("vit_base_patch16_224", **(TINY | {"img_size": 48}))
    with torch.no_grad():
        other.pos_embed.normal_()
    twin = timm.create_model(
        "vit_base_patch16_224",
        pretrained=True,
        num_classes=5,
        pretrained_cfg_overlay={"state_dict": other.state_dict()},
        **TINY,
    )
    model = tiny()
    match, notes = fill(model, other.state_dict())
    torch.testing.assert_close(model.pos_embed, twin.pos_embed, atol=0, rtol=0)
    assert notes == ("positions resampled from 6 x 6 to 4 x 4 (bicubic)",)
    assert match.loaded == 30


def test_C25_positions_without_a_row_for_the_class_token_are_told_apart_by_the_model():
    state = state_of(no_embed_class=True)  # 16 rows
    model = tiny(no_embed_class=True)
    assert fill(model, state)[0].loaded == 32
    refused(
        "ckpt.pos_grid",
        lambda: fitting.fit(state, tiny(), place="w.pth"),
        "16 rows of positions less 1 for the class token are not a square",
        place="w.pth",
        fix="no_embed_class: true",
    )


def test_C25_a_grid_that_is_not_square_must_be_given():
    state = state_of(img_size=(24, 64))  # 3 x 8 patches
    refused(
        "ckpt.pos_grid",
        lambda: fitting.fit(state, tiny()),
        "25 rows of positions less 1 for the class token are not a square",
        fix=r"pos_grid=\(height, width\)",
    )
    fitted = fitting.fit(state, tiny(), pos_grid=(3, 8))
    assert fitted.notes == ("positions resampled from 3 x 8 to 4 x 4 (bicubic)",)
    refused(
        "ckpt.pos_grid", lambda: fitting.fit(state, tiny(), pos_grid=(3, 7)), "not a grid of 3 x 7"
    )
    same = tiny(img_size=(24, 64))  # its own grid needs no word
    assert fill(same, state)[1] == ()
    assert torch.equal(same.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_C26_a_value_that_is_no_number_is_found_and_counted(tmp_path, value, dtype):
    state = {k: v.to(dtype) for k, v in state_of().items()}
    state["blocks.0.attn.qkv.weight"][5, 5] = value
    path = tmp_path / "w.pth"
    torch.save(state, path)
    refused(
        "ckpt.nonfinite",
        lambda: weights.read(path),
        r"blocks\.0\.attn\.qkv\.weight is not finite \(1 of 3,072 values\)",
        place=path,
        fix="earlier checkpoint",
    )


def test_large_values_whose_sum_is_infinite_are_finite():
    large = torch.full((4,), 3e38)
    assert torch.isinf(large.sum())
    assert tensorfile.count_nonfinite(large) == 0
    large[1] = torch.nan
    assert tensorfile.count_nonfinite(large) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_C27_other_floats_are_converted_and_said(tmp_path, dtype):
    path = tmp_path / "w.safetensors"
    state = {k: v.to(dtype) for k, v in state_of().items()}
    save_file(state, path)
    model = tiny()
    tensors, notes = fitting.load_for(model, path)
    name = str(dtype).removeprefix("torch.")
    assert notes == (f"values stored as {name} are converted to the model's type",)
    tally.check(tensors, model.state_dict())
    model.load_state_dict(tensors)
    torch.testing.assert_close(model.norm.weight, state["norm.weight"].float())
    assert model.norm.weight.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_C27_integers_where_floats_belong_are_refused(dtype):
    state = state_of() | {"norm.bias": torch.zeros(32, dtype=dtype)}
    refused(
        "ckpt.dtype",
        lambda: fitting.complete(state, tiny()),
        rf"norm\.bias is {dtype}, the model has torch\.float32",
    )


def test_C28_object_arrays_are_refused_and_nothing_runs(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "w.npz"
    evil = np.array([Payload(os.system, f"touch {marker}")], dtype=object)
    np.savez(path, good=np.ones(3), evil=evil, allow_pickle=True)
    refused(
        "ckpt.code", lambda: weights.read(path), "array 'evil' holds Python objects", place=path
    )
    assert not marker.exists()


def test_C29_an_archive_that_is_no_vit_is_refused_by_its_names(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **{"params/conv1/kernel": np.ones((3, 3), np.float32)})
    refused(
        "ckpt.architecture",
        lambda: fitting.complete(weights.read(path), tiny(), place=path),
        r"missing 30 tensors .*unexpected 1 tensor \(params/conv1/kernel\)",
        place=path,
        fix="another architecture",
    )


def test_C31_strange_names_are_escaped_and_cut(tmp_path):
    path = tmp_path / "w.pth"
    long = "x" * 100_000
    torch.save(state_of() | {"../../etc/\x1b[31mred\n": torch.ones(1), long: torch.ones(1)}, path)
    with pytest.raises(WeightsError) as caught:
        fitting.complete(weights.read(path), tiny(), place=path)
    message = str(caught.value)
    assert "\\x1b[31mred\\n" in message
    assert "(100,000 characters)" in message
    assert len(message) < 1000
    assert "\x1b" not in message


# --- what reads well -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pth", "legacy", "safetensors", "npz"])
def test_every_kind_of_file_gives_the_same_tensors(tmp_path, form):
    path = saved(tmp_path, form)
    found = weights.open_file(path)
    assert torch.equal(found.tensors["a.weight"], torch.arange(600.0))
    assert len(found.sha256) == 64
    assert set(found.tensors) == {"a.weight", "b.bias"}


def test_a_command_line_beside_the_weights_does_no_harm(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"args": Namespace(lr=1e-3), "model": OrderedDict(state_of())}, path)
    assert len(weights.read(path)) == 32


def test_bfloat16_arrays_of_jax_are_understood(tmp_path):
    path = tmp_path / "w.npz"
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    np.savez(path, w=values.view(torch.int16).numpy().view("V2"), b=np.float32(3))
    tensors = weights.read(path)
    assert torch.equal(tensors["w"], values)
    assert tensors["b"] == 3


def test_metadata_of_safetensors_is_read_and_others_have_none(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors", metadata={"vitft": "{}"})
    assert weights.read_metadata(tmp_path / "w.safetensors") == {"vitft": "{}"}
    assert weights.open_file(tmp_path / "w.safetensors").metadata == {"vitft": "{}"}
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    assert weights.read_metadata(tmp_path / "w.pth") == {}


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from(
        [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x10" + b"\0" * 7 + b"{"]
    ),
    data=st.binary(max_size=200),
    suffix=st.sampled_from([".pth", ".safetensors", ".npz"]),
)
def test_arbitrary_bytes_never_give_anything_but_a_named_fault(
    tmp_path_factory, start, data, suffix
):
    path = tmp_path_factory.mktemp("fuzz") / f"w{suffix}"
    path.write_bytes(start + data)
    with pytest.raises(WeightsError) as caught:
        weights.read(path)
    assert caught.value.faults[0].id.startswith("ckpt.")


def test_a_fingerprint_depends_on_every_byte_name_shape_and_type_but_not_on_order():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    base = weights.fingerprint(state)
    assert len(base) == 64
    assert weights.fingerprint(dict(reversed(state.items()))) == base
    assert weights.fingerprint({k: v.clone() for k, v in state.items()}) == base
    changed = [
        state | {"a": torch.tensor([0.0, 1, 2, 3.0000002])},
        state | {"a": torch.arange(4.0).reshape(2, 2)},
        state | {"a": torch.arange(4.0).int()},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"]},
    ]
    assert len({base, *map(weights.fingerprint, changed)}) == 6
    assert weights.fingerprint({"x": torch.tensor(1.0), "y": torch.zeros(0)})
    assert weights.fingerprint({"a": torch.ones(2, 3).T}) == weights.fingerprint(
        {"a": torch.ones(3, 2)}
    )


def test_the_bundled_weights_fill_their_model():
    path = weights.bundled_file()
    model = timm.create_model("vitflower_s14")
    tensors, notes = fitting.load_for(model, path)
    match = tally.check(tensors, model.state_dict(), place=path)
    assert match.loaded == len(model.state_dict())
    assert match.new == ()


def test_a_missing_bundle_is_named(monkeypatch):
    monkeypatch.setattr(weights, "BUNDLED", "gone.safetensors")
    refused("ckpt.missing", weights.bundled_file, "installation lacks it", place="gone.safetensors")


def test_a_model_that_is_no_vit_is_filled_and_checked_too(tmp_path):
    net = timm.create_model("resnet10t", num_classes=3)
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, path)
    other = timm.create_model("resnet10t", num_classes=4)
    tensors, notes = fitting.load_for(other, path)
    head = ("fc.weight", "fc.bias")
    match = tally.check(tensors, other.state_dict(), new=head, drop=head, place=path)
    assert set(match.dropped) == set(match.new) == set(head)
    assert match.loaded == len(other.state_dict()) - 2


# --- the historical checkpoint, through timm's door ----------------------------------------------


def jx_state(depth=12):
    """Names and shapes of jx_vit_base_patch16_224_in21k, at no cost: repeated values."""
    with torch.device("meta"):
        model = timm.create_model(
            "vitflower_b16", num_classes=21843, representation_size=768, depth=depth
        )
    state = {}
    for i, (name, t) in enumerate(model.state_dict().items()):
        value = 0.0 if name.startswith("head.") else 0.001 * (i + 1)
        state[name] = torch.tensor(value).expand(t.shape)
    return state


def jx_file(folder, state):
    path = folder / "jx.pth"
    torch.save(state, path)
    digest = weights.open_file(path).sha256
    return path.rename(folder / f"jx_vit_base_patch16_224_in21k-{digest[:8]}.pth")


def test_the_historical_names_and_shapes_fit_tensor_by_tensor():
    state = jx_state()
    assert len(state) == 154
    assert sum(v.numel() for v in state.values()) == 103_186_515
    with torch.device("meta"):
        flowers = timm.create_model("vitflower_b16", num_classes=5)
        whole = timm.create_model("vitflower_b16", num_classes=21843, representation_size=768)
        plain = timm.create_model("vitflower_b16")
    _, match, _ = fitting.complete(state, flowers)
    assert match.loaded == 150
    assert match.new == ("head.weight", "head.bias")
    assert match.dropped == {
        "pre_logits.fc.weight": "the representation layer is left out for transfer",
        "pre_logits.fc.bias": "the representation layer is left out for transfer",
        "head.weight": "it is for 21,843 classes (all zeros), the model has 5",
        "head.bias": "it is for 21,843 classes (all zeros), the model has 5",
    }
    _, match, _ = fitting.complete(state, whole)
    assert (match.loaded, match.dropped, match.new) == (154, {}, ())
    _, match, _ = fitting.complete(state, plain)
    assert match.loaded == 152
    assert list(match.dropped) == ["pre_logits.fc.weight", "pre_logits.fc.bias"]


def test_the_historical_file_loads_through_timm_for_any_number_of_classes(tmp_path, caplog):
    state = {
        k: v.contiguous() if k.startswith("blocks.1.norm") else v for k, v in jx_state(2).items()
    }
    overlay = {"file": str(jx_file(tmp_path, state))}
    for classes in (5, 0):
        caplog.clear()
        with caplog.at_level("WARNING", "vitft"):
            model = timm.create_model(
                "vitflower_b16",
                pretrained=True,
                num_classes=classes,
                depth=2,
                pretrained_cfg_overlay=overlay,
            )
        own = model.state_dict()
        assert all(torch.equal(own[k], state[k]) for k in own if not k.startswith("head."))
        said = [r.getMessage() for r in caplog.records]
        assert any(
            s.startswith("weights: left out head.weight: it is for 21,843")
            or s.startswith("weights: left out head.weight: the model has no")
            for s in said
        )
        assert any("left out pre_logits.fc.bias: the representation layer" in s for s in said)
        assert model.pretrained_cfg["state_dict"] is None
        assert model.pretrained_cfg["first_conv"] == "patch_embed.proj"
    assert caplog.records
    features = timm.create_model(
        "vitflower_b16",
        pretrained=True,
        features_only=True,
        depth=2,
        out_indices=(1,),
        pretrained_cfg_overlay=overlay,
    )
    assert torch.equal(features.model.blocks[1].mlp.fc1.bias, state["blocks.1.mlp.fc1.bias"])


def through_timm(path, **options):
    options = TINY | {"num_classes": 5} | options
    return timm.create_model(
        "vitflower_b16", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options
    )


def test_timms_door_takes_a_head_that_fits_although_the_name_promises_another(tmp_path):
    path = tmp_path / "w.safetensors"
    state = state_of()
    save_file(state, path)
    model = through_timm(path)
    assert torch.equal(model.head.weight, state["head.weight"])
    assert model.pretrained_cfg["num_classes"] == 5


def test_timms_door_adapts_channels_once(tmp_path, caplog):
    path = tmp_path / "w.safetensors"
    state = state_of()
    save_file(state, path)
    with caplog.at_level("WARNING"):
        model = through_timm(path, in_chans=1)
    expected = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    assert caplog.records == []


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "pos_embed", "norm.bias"])
@pytest.mark.parametrize("classes", [5, 9])
def test_timms_door_refuses_a_key_missing_renamed_or_misshapen_by_name(tmp_path, name, classes):
    whole = state_of()
    path = tmp_path / "w.pth"
    missing = {k: v for k, v in whole.items() if k != name}
    renamed = {k if k != name else f"{k}_old": v for k, v in whole.items()}
    misshapen = whole | {name: torch.zeros(1, 3, 3)}
    for state, id, text in (
        (missing, "ckpt.missing_keys", name),
        (renamed, "ckpt.unexpected_keys", f"{name}_old"),
        (misshapen, "ckpt.shape", rf"{name} is \[1, 3, 3\], the model has"),
    ):
        torch.save(state, path)
        refused(id, lambda: through_timm(path, num_classes=classes), text, place=path, every=True)


def test_timms_door_refuses_garbage_where_timm_would_not(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"nonsense": torch.ones(3)}, path)
    timm.create_model(  # timm: a random model and no word
        "vit_base_patch16_224",
        pretrained=True,
        num_classes=5,
        pretrained_cfg_overlay={"file": str(path)},
        **TINY,
    )
    refused("ckpt.architecture", lambda: through_timm(path), "0 of the model's 32", place=path)
    overlay = {"state_dict": {"nonsense": torch.ones(3)}}
    with pytest.raises(WeightsError, match="0 of the model's 32"):
        timm.create_model(
            "vitflower_b16", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, **TINY
        )


@pytest.mark.parametrize(
    ("options", "of_file", "fix"),
    [
        ({}, {"init_values": 0.1}, "init_values: 1e-5"),
        ({"init_values": 0.1}, {}, "leave init_values out"),
        ({}, {"reg_tokens": 4}, "reg_tokens: 4"),
        ({"reg_tokens": 2}, {}, "leave reg_tokens out"),
        ({}, {"pre_norm": True}, "pre_norm: true"),
        ({"global_pool": "avg"}, {}, "fc_norm: false"),
        ({}, {"global_pool": "avg"}, "global_pool: avg"),
        ({"representation_size": 8}, {}, "leave representation_size out"),
        ({}, {"qkv_bias": False}, "qkv_bias: false"),
        ({}, {"class_token": False, "global_pool": "avg", "fc_norm": False}, "class_token: false"),
    ],
)
def test_a_mismatch_of_options_names_the_option(options, of_file, fix):
    with pytest.raises(WeightsError) as caught:
        fitting.complete(state_of(**of_file), tiny(**options))
    assert fix in caught.value.faults[0].fix


@pytest.mark.parametrize("pos", ["none", "sincos2d"])
def test_positions_the_model_computes_or_lacks_are_left_out_with_the_reason(pos):
    model = tiny(pos_embed=pos)
    own = None if pos == "none" else model.pos_embed.clone()
    match, _ = fill(model, state_of())
    assert list(match.dropped) == ["pos_embed"]
    assert own is None or torch.equal(model.pos_embed, own)


def test_a_head_trained_on_the_representation_layer_goes_with_it():
    state = state_of(representation_size=32)
    match, _ = fill(tiny(), state)
    assert match.dropped["head.weight"].startswith("the head reads the representation layer")
    assert match.new == ("head.weight", "head.bias")
    match, _ = fill(tiny(representation_size=32), state)
    assert match.loaded == len(state)


def test_size_bound_admits_compressed_weights_and_no_bomb():
    assert tensorfile.size_bound(400_000_000) == 3_267_108_864
    assert tensorfile.size_bound(0) == 67_108_864


@pytest.mark.shared
def test_the_real_weights_equal_timms_model_bit_for_bit(real_weights):
    path = real_weights / "dinov2_vits14_imgfocus.fp16.safetensors"
    overlay = {"pretrained_cfg_overlay": {"file": str(path)}, "pretrained": True}
    ours = timm.create_model("vitflower_s14", **overlay).eval()
    twin = timm.create_model("vit_small_patch14_dinov2", img_size=224, **overlay).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.forward_features(x), twin.forward_features(x), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(ours(x), twin(x), atol=1e-5, rtol=1e-5)


@pytest.mark.shared
def test_the_real_efficientnet_fits_and_its_vit_neighbour_does_not(real_weights):
    path = real_weights / "tf_efficientnet_lite0.safetensors"
    net = timm.create_model("tf_efficientnet_lite0")
    tensors, notes = fitting.load_for(net, path)
    assert tally.check(tensors, net.state_dict(), place=path).new == ()
    refused(
        "ckpt.architecture",
        lambda: fitting.complete(tensors, tiny(), place=path),
        "0 of the model's 32",
        fix="looks like an EfficientNet or MobileNet; the model is a ViT",
    )
