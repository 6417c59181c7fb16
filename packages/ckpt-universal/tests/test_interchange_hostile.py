"""Files of others that were made to do harm: none of them runs anything, or changes anything in this process."""

from __future__ import annotations

import struct
from pathlib import Path

import ckpt_universal as ckpt
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ckpt_universal.interchange import dcp as our_dcp
from ckpt_universal.interchange import unpickle
from ckpt_universal.interchange.convert import open_source
from ckpt_universal.interchange.unpickle import load_plain, load_tensors


class Saving(torch.nn.Module):
    """`aten::save` is an operator of TorchScript that writes a file."""

    def __init__(self, file: str):
        super().__init__()
        self.file = file

    @torch.jit.export
    def __getstate__(self):
        return (self.file, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.file = state[0]
        self.training = state[1]
        torch.ops.aten.save(self.file, self.file)

    def forward(self, x):
        return x


def test_a_program_of_torchscript_is_refused_before_it_runs(tmp_path):
    canary = tmp_path / "was-run"
    folder = tmp_path / "ds"
    folder.mkdir()
    file = folder / "mp_rank_00_model_states.pt"
    torch.jit.save(torch.jit.script(Saving(str(canary))), file)
    canary.unlink(missing_ok=True)
    torch.jit.load(file)
    assert canary.exists(), "it would do harm"
    canary.unlink()
    with pytest.raises(ckpt.CheckpointError, match=r"mp_rank_00_model_states\.pt: a TorchScript archive"):
        load_tensors(file)
    with pytest.raises(ckpt.CheckpointError, match="a TorchScript archive"):
        open_source(folder)
    assert not canary.exists()


def setting(module: str, name: str, attribute: str) -> bytes:
    """A pickle that sets an attribute of what it names to an empty tuple."""
    text = attribute.encode()
    return (
        b"\x80\x02c"
        + f"{module}\n{name}\n".encode()
        + b"N}X"
        + struct.pack("<I", len(text))
        + text
        + b")s\x86b."
    )


EVERYTHING = {**unpickle._ALLOWED, **our_dcp._CLASSES, **dict.fromkeys(unpickle.INERT, unpickle.Inert)}


@pytest.mark.parametrize(("module", "name"), sorted(EVERYTHING))
@pytest.mark.parametrize(
    "attribute", ["__defaults__", "_function", "__setstate__", "__call__", "__init__", "dtype"]
)
def test_nothing_that_a_pickle_is_handed_can_be_changed(module, name, attribute):
    handed = EVERYTHING[module, name]
    before = getattr(handed, attribute, None)
    with pytest.raises(ckpt.CheckpointError):
        load_plain(setting(module, name, attribute), our_dcp._CLASSES, "x")
    # as the other half of BUILD's state, a dictionary
    with pytest.raises(ckpt.CheckpointError):
        load_plain(
            setting(module, name, attribute).replace(b"N}X", b"}X").replace(b"s\x86b.", b"sb."),
            our_dcp._CLASSES,
            "x",
        )
    assert getattr(handed, attribute, None) == before


def test_metadata_cannot_change_functions_of_torch(tmp_path):
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    before = torch._utils._rebuild_tensor_v2.__defaults__
    data = b"\x80\x02" + b"ctorch._utils\n_rebuild_tensor_v2\n" + b"N}X" + struct.pack("<I", 12)
    (tmp_path / ".metadata").write_bytes(data + b"__defaults__)s\x86b.")
    with pytest.raises(ckpt.CheckpointError, match="metadata"):
        open_source(tmp_path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


def test_a_tensor_with_attributes_is_read_without_them(tmp_path):
    tensor = torch.arange(3.0)
    tensor.ds_id = 7
    torch.save({"module": {"w": tensor}, "param": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    found = load_tensors(Path(tmp_path / "x.pt"))
    assert torch.equal(found["module"]["w"], tensor)
    assert not hasattr(found["module"]["w"], "ds_id")
    assert torch.equal(found["param"], torch.ones(2))
