"""The solve behind AlphaEdit and MEMIT: equal to the dense solves, batch after batch, and to itself after a resume."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.plain import solves as plain
from sphere import SphereError
from sphere.checkpoints import read_resume, write_resume
from sphere.methods.null_space import null_space_projector
from sphere.methods.sequential_solve import (
    PENDING,
    SequentialSolve,
    inverse_moment,
    keep_solves,
    load_solves,
    save_solves,
)

CPU = torch.device("cpu")
IN, RIDGE, WEIGHT = 24, 2.0, 3.0
quick = settings(max_examples=25, deadline=None)


def moment(seed: int = 0, size: int = IN) -> Tensor:
    """E[k k^T] (in x in) float64 with eigenvalues from 1e-3 to 10."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return basis * torch.logspace(-3, 1, size, dtype=torch.float64) @ basis.T


def batches(seed: int, counts: list[int], size: int = IN) -> list[Tensor]:
    """Keys (in x n) of some batches, in float32 as models give them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, n, generator=generator) for n in counts]


def alphaedit_solve(threshold: float = 0.3) -> tuple[SequentialSolve, Tensor]:
    """The solve, and the dense P (in x in) of the same projector."""
    projector = null_space_projector(moment(), threshold)
    dense = projector.apply(torch.eye(IN, dtype=torch.float64))
    return SequentialSolve(projector.apply, RIDGE, "layer 0"), dense


def memit_solve() -> SequentialSolve:
    return SequentialSolve(inverse_moment(moment(), WEIGHT, "layer 0"), 1.0, "layer 0")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


counts_of_batches = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@quick
@given(seed=st.integers(0, 2**31 - 1), counts=counts_of_batches, threshold=st.sampled_from([0.01, 0.3, 100]))
def test_alphaedit_equals_the_dense_solve(seed, counts, threshold):
    """In every batch of a run, on both sides of the change from S - B B^T to a matrix."""
    solve, p = alphaedit_solve(threshold)
    cache = torch.zeros(IN, IN, dtype=torch.float64)
    for keys in batches(seed, counts):
        expected = plain.alphaedit(p, keys.double(), cache, RIDGE)
        assert relative(solve.solve(keys), expected) < 1e-6
        solve.append(keys)
        solve.compact()
        cache += keys.double() @ keys.double().T
    assert solve.n_batches == len(counts)


@quick
@given(seed=st.integers(0, 2**31 - 1), counts=counts_of_batches)
def test_memit_equals_the_dense_solve(seed, counts):
    alone, sequential = memit_solve(), memit_solve()
    cache = torch.zeros(IN, IN, dtype=torch.float64)
    for keys in batches(seed, counts):
        expected = plain.memit(moment(), keys.double(), None, WEIGHT)
        assert relative(alone.solve(keys), expected) < 1e-8
        expected = plain.memit(moment(), keys.double(), cache, WEIGHT)
        assert relative(sequential.solve(keys), expected) < 1e-8
        sequential.append(keys)
        sequential.compact()
        cache += keys.double() @ keys.double().T


@quick
@given(seed=st.integers(0, 2**31 - 1), cut=st.integers(1, 11))
def test_earlier_keys_count_the_same_in_one_batch_or_two(seed, cut):
    first, keys = batches(seed, [12, 5])
    whole, parts = alphaedit_solve()[0], alphaedit_solve()[0]
    whole.append(first)
    parts.append(first[:, :cut])
    parts.append(first[:, cut:])
    assert relative(parts.solve(keys), whole.solve(keys)) < 1e-10


def test_order_of_earlier_batches_does_not_matter():
    *earlier, keys = batches(1, [4, 7, 3, 20, 5])
    forwards, backwards = alphaedit_solve()[0], alphaedit_solve()[0]
    for block in earlier:
        forwards.append(block)
    for block in earlier[::-1]:
        backwards.append(block)
    assert relative(backwards.solve(keys), forwards.solve(keys)) < 1e-10


def test_solving_does_not_change_the_state():
    first, keys, other = batches(2, [6, 5, 5])
    solve = alphaedit_solve()[0]
    solve.append(first)
    expected = solve.solve(keys)
    solve.solve(other)
    assert torch.equal(solve.solve(keys), expected)
    assert len(solve.key_blocks) == 1


def test_an_update_stays_in_the_null_space():
    solve, p = alphaedit_solve()
    for keys in batches(3, [5, 30, 5]):
        x = solve.solve(keys)
        assert relative(p @ x, x) < 1e-6
        solve.append(keys)


def test_keys_edited_before_are_hardly_moved():
    """The more often a key was edited, the less a later batch with other keys changes its value."""
    first, keys = batches(4, [3, 5])
    fresh, seen = memit_solve(), memit_solve()
    for _ in range(50):
        seen.append(first)
    assert (first.double().T @ seen.solve(keys)).norm() < 0.1 * (first.double().T @ fresh.solve(keys)).norm()


def test_thousands_of_keys_in_few_dimensions():
    """Rounding does not add up over many more keys than `in`."""
    solve, p = alphaedit_solve()
    cache = torch.zeros(IN, IN, dtype=torch.float64)
    for keys in batches(5, [20] * 150):
        last = solve.solve(keys)
        expected, cache = (
            plain.alphaedit(p, keys.double(), cache, RIDGE),
            cache + keys.double() @ keys.double().T,
        )
        solve.append(keys)
        solve.compact()
    assert relative(last, expected) < 1e-6
    assert solve.nbytes == 8 * IN * IN


# ---- saved, taken up, rolled back ----

# In batches of 2, T becomes a matrix at the 13th (more keys than IN); later ones join it two by two (IN / 8 = 3).
N_BATCHES, SWITCH = 18, 13
KINDS = {"alphaedit": lambda: alphaedit_solve()[0], "memit": memit_solve}


def blocks_of_two() -> list[Tensor]:
    """Keys as they come from a model: transposed."""
    return [keys.T.contiguous().T for keys in batches(6, [2] * N_BATCHES)]


def next_batch(solve: SequentialSolve, keys: Tensor, solved: bool = True) -> Tensor | None:
    """One batch as a run does it: X, and the state saved after it."""
    x = solve.solve(keys) if solved else None
    solve.append(keys)
    save_solves({4: solve})
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize("stop", [1, SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 2, SWITCH + 3])
def test_a_resumed_run_gives_the_same_bits(kind, solved, stop, tmp_path):
    """Through files: before, at and after T becomes a matrix and one that has taken in later batches."""
    whole, first, resumed = (KINDS[kind]() for _ in range(3))
    results = [next_batch(whole, keys, solved) for keys in blocks_of_two()]
    for keys in blocks_of_two()[:stop]:
        next_batch(first, keys, solved)
    write_resume(tmp_path, {}, save_solves({4: first}), {"n_edits": stop})
    load_solves({4: resumed}, read_resume(tmp_path)[1], {4: CPU})
    for keys, expected in zip(blocks_of_two()[stop:], results[stop:], strict=True):
        x = next_batch(resumed, keys, solved)
        assert x is expected is None or torch.equal(x, expected)
    saved, expected = save_solves({4: resumed}), save_solves({4: whole})
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("stop", [SWITCH - 1, SWITCH, SWITCH + 2])
def test_a_resume_point_of_keys_alone_is_taken_up(stop):
    """As earlier versions wrote it."""
    whole, resumed = alphaedit_solve()[0], alphaedit_solve()[0]
    for keys in blocks_of_two()[:stop]:
        next_batch(whole, keys)
    load_solves(
        {4: resumed}, {f"keys.4.{i}": keys for i, keys in enumerate(blocks_of_two()[:stop])}, {4: CPU}
    )
    for keys in blocks_of_two()[stop:]:
        assert torch.equal(next_batch(whole, keys), next_batch(resumed, keys))


@pytest.mark.parametrize("kept", range(N_BATCHES))
def test_a_batch_that_was_not_written_is_forgotten(kept):
    """Exactly, wherever it comes: after others with and without a matrix, with and without keys beside it."""
    whole, short = alphaedit_solve()[0], alphaedit_solve()[0]
    *earlier, failed = blocks_of_two()[: kept + 1]
    for keys in earlier:
        next_batch(whole, keys)
        next_batch(short, keys)
    before = save_solves({0: whole})
    known = {name: tensor.clone() for name, tensor in before.items()}
    whole.solve(failed)
    whole.append(failed)
    keep_solves({0: whole}, before.keys())
    after = save_solves({0: whole})
    assert after.keys() == known.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in known.items())
    for keys in blocks_of_two()[kept:]:  # and it goes on like a run without it
        assert torch.equal(next_batch(whole, keys), next_batch(short, keys))


@pytest.mark.parametrize("kept", [0, 1, 2, 4])
def test_forgetting_several_batches_gives_the_state_of_then(kept):
    blocks, probe = batches(8, [5] * 7), batches(9, [4])[0]
    whole, short = alphaedit_solve()[0], alphaedit_solve()[0]
    for keys in blocks:
        whole.append(keys)
    for keys in blocks[:kept]:
        short.append(keys)
    keep_solves({0: whole}, save_solves({0: short}).keys())
    assert torch.equal(whole.solve(probe), short.solve(probe))
    for keys in blocks[kept:]:
        next_batch(whole, keys)
        next_batch(short, keys)
    assert torch.equal(whole.solve(probe), short.solve(probe))


def test_what_became_a_matrix_is_not_forgotten():
    solve = alphaedit_solve()[0]
    for keys in blocks_of_two():
        next_batch(solve, keys)
    with pytest.raises(SphereError, match="layer 0 cannot go back to 3 batches"):
        solve.truncate(3)


def test_what_was_saved_under_a_name_stays_the_same():
    solve, seen = alphaedit_solve()[0], {}
    for keys in blocks_of_two():
        next_batch(solve, keys)
        saved = save_solves({4: solve})
        for name, tensor in saved.items():
            first, copy = seen.setdefault(name, (tensor, tensor.clone()))
            assert torch.equal(tensor, copy)
            assert torch.equal(first, copy)  # held by somebody since
    assert [name for name in seen if name.startswith("t.")] == ["t.4.13", "t.4.15", "t.4.17"]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_memory_and_resume_point_stay_flat_once_t_is_a_matrix(n, tmp_path):
    """The matrix, IN / PENDING columns and those of a batch at most, in memory and on the disk."""
    solve, sizes, most = alphaedit_solve()[0], [], 0
    columns = IN // PENDING + n
    for number, keys in enumerate(batches(3, [n] * (20 * IN // n)), 1):
        solve.solve(keys)
        solve.append(keys)
        memory = solve.nbytes
        saved = save_solves({0: solve})
        size = write_resume(tmp_path, {}, saved, {"n_edits": number * n})
        assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
        if number * n > IN + n:
            assert solve.compacted is not None
            assert memory <= 8 * IN * (IN + columns)
            assert sum(block.nbytes for block in solve.key_blocks) <= 4 * IN * columns
            sizes.append(sum(tensor.nbytes for tensor in saved.values()))
            most = max(most, size)
    cycle = len(sizes) // 2
    assert max(sizes[:cycle]) == max(sizes[cycle:])
    assert most <= 1.5 * (8 * IN * IN) + 4096  # headers of small files


def test_what_is_saved_has_its_own_name_per_layer_and_batch():
    solves = {3: memit_solve(), 5: memit_solve()}
    for solve, seed in zip(solves.values(), (0, 1), strict=True):
        for keys in batches(seed, [2, 3]):
            solve.append(keys)
    saved = save_solves(solves)
    assert set(saved) == {"keys.3.0", "keys.3.1", "keys.5.0", "keys.5.1"}
    assert saved["keys.5.1"].shape == (IN, 3)
    assert saved["keys.5.1"].dtype == torch.float32
    solves[5].append(batches(2, [IN])[0])
    assert set(save_solves(solves)) == {"keys.3.0", "keys.3.1", "t.5.3", "c_s_w.5.3"}
    solves[5].append(batches(2, [1])[0])
    assert set(save_solves(solves)) == {"keys.3.0", "keys.3.1", "t.5.3", "c_s_w.5.3", "keys.5.3"}


def test_float64_keys_are_solved_as_they_are():
    keys = batches(10, [4])[0].double() + 1e-10
    solve, p = alphaedit_solve()
    expected = plain.alphaedit(p, keys, torch.zeros(IN, IN, dtype=torch.float64), RIDGE)
    assert relative(solve.solve(keys), expected) < 1e-10


@pytest.mark.parametrize("count", [1, 6], ids=["factor", "matrix"])
def test_a_state_that_went_wrong_is_found(count):
    """A preconditioner that drifts stands for whatever spoils T, be it kept as S - B B^T or as a matrix."""
    first, keys = batches(11, [6, 5])
    whole, calls = alphaedit_solve()[0].apply_s, []

    def drifting(k: Tensor) -> Tensor:
        calls.append(1)
        return (1 + 1e-3 * len(calls)) * whole(k)

    solve = SequentialSolve(drifting, RIDGE, "layer 0")
    for _ in range(count):
        solve.append(first)
        solve.compact()
    with pytest.raises(SphereError, match="L2"):
        solve.solve(keys)


def test_inverse_moment():
    second, keys = moment(1).float(), batches(12, [4])[0].double()
    before = second.clone()
    applied = inverse_moment(second, WEIGHT, "layer 0")(keys)
    assert relative(WEIGHT * second.double() @ applied, keys) < 1e-8
    assert torch.equal(second, before)


def test_a_second_moment_that_rounding_made_indefinite_is_fixed():
    second = moment(2)
    values, vectors = torch.linalg.eigh(second)
    values[0] = -1e-7
    applied = inverse_moment(vectors * values @ vectors.T, 1.0, "layer 0")(vectors[:, -1:])
    assert relative(applied, vectors[:, -1:] / values[-1]) < 1e-4


def test_errors_say_what_to_change():
    with pytest.raises(SphereError, match="L2"):
        SequentialSolve(lambda k: k, 0.0, "layer 0")
    with pytest.raises(SphereError, match="mom2_n_samples"):
        inverse_moment(-torch.eye(4), 1.0, "layer 0")
    with pytest.raises(SphereError, match="mom2_update_weight"):
        inverse_moment(torch.eye(4), 0.0, "layer 0")
    with pytest.raises(SphereError, match="finite"):
        memit_solve().solve(torch.full((IN, 2), float("nan")))
    with pytest.raises(SphereError, match="positive definite"):
        SequentialSolve(lambda k: -k, 1.0, "layer 0").solve(torch.ones(IN, 2))
