"""The Triton kernels beside plain torch, interpreted on the CPU: the arithmetic, not the speed. tests/train/models/test_kernels.py starts this file
in a process of its own, since Triton decides when it is imported whether it interprets. On a GPU: tests/train/test_gpu.py."""

import itertools

import pytest
import torch
from torch import Tensor

from train.kernels import adamw, cross_entropy
from train.models import ops
from train.models.gpt import GPT, GPTConfig
from train.models.loss import chunk_terms


def leaves(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def both(plain, fused, inputs: list[Tensor], weights_of_outputs: int = 7) -> list[tuple[Tensor, Tensor]]:  # type: ignore[no-untyped-def]
    """Outputs and gradients of the inputs, by plain torch and by a kernel, for the same gradients of the outputs."""
    found = []
    for function in (plain, fused):
        copies = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*copies)
        out = out if isinstance(out, tuple) else (out,)
        grads = leaves(weights_of_outputs, *(tuple(o.shape) for o in out))
        torch.autograd.backward(out, [g.detach().to(o) for g, o in zip(grads, out, strict=True)])
        found.append([*out, *(c.grad for c in copies)])
    return list(zip(*found, strict=True))


def close(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    # Both compute in fp32 and round once or twice.
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for plain, fused in pairs:
        assert plain.dtype == fused.dtype and plain.shape == fused.shape
        assert float((plain.double() - fused.double()).norm() / plain.double().norm()) <= bound


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 48])
def test_norm_of_the_stream_with_what_is_added(dtype: torch.dtype, width: int) -> None:
    inputs = [*leaves(0, (3, 5, width), (3, 5, width), dtype=dtype), *leaves(1, (width,))]
    close(both(*(lambda *t, f=o.add_norm: f(*t, 1e-5, dtype) for o in (ops.PLAIN, ops.fused(32))), inputs), dtype)


def test_a_norm_behind_which_the_stream_ends() -> None:
    inputs = [*leaves(0, (7, 32), (7, 32)), *leaves(1, (32,))]
    close(both(*(lambda *t, f=o.add_norm: f(*t, 1e-5, torch.float32)[1] for o in (ops.PLAIN, ops.fused(32))), inputs), torch.float32)


def test_a_stream_in_fp32_gives_norms_in_fp16() -> None:
    fused = ops.fused(32)
    (x,), (delta,), (weight,) = leaves(0, (4, 32)), leaves(1, (4, 32), dtype=torch.float16), leaves(2, (32,))
    pairs = both(*(lambda *t, f=o.add_norm: f(*t, 1e-5, torch.float16) for o in (ops.PLAIN, fused)), [x, delta, weight])
    assert [plain.dtype for plain, _ in pairs] == [torch.float32, torch.float16, torch.float32, torch.float16, torch.float32]
    close(pairs, torch.float16)


@pytest.mark.parametrize(("dtype", "width"), itertools.product(DTYPES, [24, 256]))
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    close(both(ops.PLAIN.swiglu, ops.fused(32).swiglu, leaves(0, (2, 9, 2 * width), dtype=dtype)), dtype)


@pytest.mark.parametrize(("dtype", "kv_heads"), itertools.product(DTYPES, [3, 1]))
def test_rotary_positions_of_packed_heads(dtype: torch.dtype, kv_heads: int) -> None:
    angle = torch.rand(5, 8) * 6
    inputs = leaves(0, (2, 5, 3 + 2 * kv_heads, 16), dtype=dtype)
    close(both(*(lambda t, f=o.rotary: f(t, angle.cos(), angle.sin(), 3, kv_heads) for o in (ops.PLAIN, ops.fused(16))), inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_table_adds_up_rare_and_frequent_tokens(dtype: torch.dtype) -> None:
    (weight,) = leaves(0, (11, 300), dtype=dtype)
    tokens = torch.tensor([[3, 3, 0, 9, 3], [9, 3, 3, 5, 0]]).repeat(7, 1)  # 35 times 3, and some never
    (_, plain), (_, fused) = ((0, pair) for pair in both(*(lambda w, f=o.embed: f(tokens, w) for o in (ops.PLAIN, ops.fused(32))), [weight]))
    assert torch.equal(*plain) and float((fused[0].double() - fused[1].double()).norm() / fused[0].double().norm()) < {torch.float32: 1e-6}.get(dtype, 2**-6)


@pytest.mark.parametrize(("dtype", "vocab"), itertools.product(DTYPES, [50, 4096, 9001]))
def test_loss_and_its_gradient_in_the_place_of_the_logits(dtype: torch.dtype, vocab: int) -> None:
    hidden, weight = leaves(0, (6, 24), (vocab, 24), dtype=dtype)
    targets, scale = torch.tensor([0, vocab - 1, 7, 3, 0, 41]), torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 2.0])
    with torch.no_grad():
        (plain, by_plain), (fused, by_fused) = (terms(hidden, weight, targets, scale) for terms in (chunk_terms, cross_entropy.terms))
    assert fused.dtype == torch.float32 and not by_fused[2].any() and (by_fused[5] < 0).nonzero().tolist() == [[41]]
    close([(plain, fused), (by_plain, by_fused)], dtype)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_logit_that_is_not_finite_shows_in_the_loss(bad: float) -> None:
    logits = torch.zeros(2, 40)
    logits[1, 17] = bad
    loss = cross_entropy.cross_entropy_(logits, torch.tensor([3, 3]), torch.ones(2))
    assert loss[0].isfinite() and loss[1].isnan() and logits[0].isfinite().all() and logits[1].isnan().any()


def test_a_logit_of_minus_infinity_is_a_token_that_never_comes() -> None:
    logits = torch.full((1, 5000), -float("inf"))
    logits[0, 4999], logits[0, 2] = 1.0, 1.0
    loss = cross_entropy.cross_entropy_(logits, torch.tensor([2]), torch.ones(1))
    assert abs(float(loss) - 0.6931) < 1e-4 and float(logits[0, 4999]) == pytest.approx(0.5) and float(logits.abs().sum()) == pytest.approx(1.0)


def test_heads_whose_width_is_no_power_of_two_keep_plain_rotary_positions() -> None:
    assert ops.fused(96).rotary is ops.PLAIN.rotary and ops.fused(96).swiglu is not ops.PLAIN.swiglu


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_gives_the_same_loss_and_gradients(checkpointed: bool, autocast: bool) -> None:
    config = GPTConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=48, seq_len=8, checkpoint_blocks=checkpointed)
    torch.manual_seed(0)
    model = GPT(config)
    tokens = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for kernels in (False, True):
        if kernels:
            model.use_kernels()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(list(model.parameters())) + 1
    for plain, fused in zip(*found, strict=True):
        assert float((plain - fused).norm() / plain.norm()) < (0.02 if autocast else 1e-5)


def test_a_compiler_traces_through_them() -> None:
    """The graph is whole, and has the kernels as operations of their own."""
    model = GPT(GPTConfig(d_model=32, n_layers=1, n_heads=2, d_ff=48, seq_len=8))
    model.use_kernels()
    tokens = torch.randint(0, 256, (2, 8))
    expected = model(tokens, tokens)
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    model.compile_regions(backend=aot_autograd(fw_compiler=look, bw_compiler=look), fullgraph=True)
    loss = model(tokens, tokens)
    loss.backward()
    for name in ("add_rms_norm", "add_rms_norm_backward", "swiglu", "swiglu_backward", "rotary", "rotary_backward"):
        assert f"holdfast.{name}.default" in seen
    torch.testing.assert_close(loss, expected)
    for p, grad in zip((p for p in model.parameters() if p.grad is not None), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("low_dtype", [None, torch.bfloat16])
def test_adamw_updates_as_torch_does(low_dtype: torch.dtype | None) -> None:
    lr, decay, betas, eps, factor = 3e-2, 0.1, (0.9, 0.95), 1e-8, 0.25
    (start,) = leaves(0, (37, 53))
    theirs = torch.nn.Parameter(start.detach().clone())
    optimizer = torch.optim.AdamW([theirs], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    weight, mean, square = start.detach().clone(), torch.zeros(37, 53), torch.zeros(37, 53)
    low = None if low_dtype is None else weight.to(low_dtype)
    step, scale, good, bad = torch.zeros(()), torch.tensor(factor), torch.zeros(()), torch.ones(())
    for n in range(6):
        grad = torch.randn(37, 53, generator=torch.Generator().manual_seed(n)).to(low_dtype or torch.float32)
        theirs.grad = grad.float() * factor
        optimizer.step()
        before = weight.clone()
        for says in (bad, good):
            step += 1 - says
            adamw.update(weight, grad, mean, square, low, step, scale, says, lr=lr, weight_decay=decay, betas=betas, eps=eps)
            if says is bad:
                assert torch.equal(weight, before)
                continue
        torch.testing.assert_close(weight, theirs.detach(), rtol=1e-5, atol=1e-6)
        # On the CPU Triton's interpreter cuts bf16 off where a GPU rounds.
        assert low is None or torch.allclose(low.float(), weight, rtol=2**-7, atol=0)
