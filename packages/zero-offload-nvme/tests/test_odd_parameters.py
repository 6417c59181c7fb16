"""Parameters of every kind of layout, and those that are refused with a word about what to do."""

from __future__ import annotations

import pytest
import torch
import zero_offload_nvme as off
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_models import make_params, train
from torch import nn
from zero_offload_nvme.rows import is_dense

LAYOUTS = {
    "transposed": lambda: torch.randn(6, 9).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every other": lambda: torch.randn(20)[::2],
    "a column": lambda: torch.randn(6, 9)[:, 3],
    "a corner": lambda: torch.randn(6, 9)[1:4, 2:7],
    "permuted corner": lambda: torch.randn(4, 6, 9)[:, 1:4, 2:7].permute(2, 0, 1),
    "a tail, unaligned": lambda: torch.randn(1001)[1:],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = LAYOUTS[layout]()
    param = nn.Parameter(torch.empty_strided(whole.shape, whole.stride(), dtype=dtype).copy_(whole))
    plain = nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    strides, address = param.stride(), param.data_ptr()
    train((off.CPUAdamW([param]), [param]), (off.CPUAdamW([plain]), [plain]), steps=4)
    assert torch.equal(param, plain)
    assert (param.stride(), param.data_ptr()) == (strides, address)


def test_what_lies_between_the_elements_of_a_parameter_stays() -> None:
    memory = torch.ones(20)
    param = nn.Parameter(memory[::2])
    assert param.data_ptr() == memory.data_ptr()
    train((off.CPUAdamW([param], lr=0.1), [param]), steps=2)
    assert (memory[1::2] == 1).all()
    assert (memory[::2] != 1).all()


def test_states_exchange_with_torch_in_another_order_of_memory() -> None:
    params = [nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))]
    others = [nn.Parameter(params[0].detach().clone(memory_format=torch.contiguous_format))]
    theirs = torch.optim.AdamW(others)
    train((theirs, others), steps=2)
    params[0].data.copy_(others[0])
    ours = off.CPUAdamW(params)
    ours.load_state_dict(theirs.state_dict())
    train((ours, params), (theirs, others), steps=2, seed=1)
    torch.testing.assert_close(params[0].detach(), others[0].detach(), rtol=1e-6, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_dense_means_that_no_memory_lies_between(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    made = torch.arange(int(torch.tensor(shape).prod())).reshape([shape[k] for k in order])
    tensor = made.permute([order.index(k) for k in range(len(shape))])
    assert tuple(tensor.shape) == tuple(shape)
    assert is_dense(tensor.shape, tensor.stride())
    if tensor.numel() and max(shape, default=0) > 1:
        spread = torch.empty_strided(tensor.shape, [2 * stride for stride in tensor.stride()])
        assert not is_dense(spread.shape, spread.stride())
        assert not is_dense((*tensor.shape, 2), (*tensor.stride(), 0))


def test_inference_and_frozen_parameters() -> None:
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    params = [frozen, *make_params([(3,)])]
    optimizer = off.CPUAdamW(params)
    params[1].grad = torch.ones(3)
    optimizer.step()
    assert (frozen == 1).all()
    assert frozen not in optimizer.state


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = off.CPUAdagrad(model.named_parameters())
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of group 0 \('weight'\), .*torch.sparse_coo; build the emb"
    ):
        optimizer.step()
    assert optimizer.state[model.weight]["step"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_that_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=r"CPUAdamW: parameter 0 of group 0.*expected a dense float32, bfloat16 or"
    ):
        off.CPUAdamW([nn.Parameter(torch.ones(2, dtype=dtype))])


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (off.CPUAdamW, {"amsgrad": True}, "CPUAdamW: amsgrad=True: expected False"),
        (off.CPUAdam, {"maximize": True}, "maximize=True: .* negate the loss"),
        (off.CPUAdagrad, {"maximize": True}, "maximize=True"),
        (off.CPUAdamW, {"lr": -1.0}, "lr: expected a finite number >= 0, got -1.0"),
        (off.CPUAdamW, {"eps": float("nan")}, "eps: expected a finite"),
        (off.CPULion, {"weight_decay": -0.1}, "weight_decay: expected"),
        (off.CPULion, {"betas": (0.9, 1.0)}, "betas: expected 0 <= beta < 1"),
        (off.CPUAdagrad, {"lr_decay": -1.0}, "lr_decay: expected"),
    ],
)
def test_options_that_are_refused(make: type, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make(make_params([(2,)]), **options)
    assert isinstance(caught.value, off.OffloadConfigError)
    optimizer = make(make_params([(2,)]))
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": make_params([(3,)]), **options})
    assert len(optimizer.param_groups) == 1
