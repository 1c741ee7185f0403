"""The order of samples and the micro-batches: against definitions written out naively, for every world size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from dist_qft.data.ahead import BatchesAhead
from dist_qft.data.batches import Batches, eval_batches
from dist_qft.data.dataset import TokenDataset
from dist_qft.data.mixture import order
from dist_qft.data.tokens import TokenSequence

PAD = 999


def make_dataset(lengths, packed_length=None):
    """Sample i consists of distinct tokens 50 i + 1, 50 i + 2, ...; all but the first are targets."""
    sequences = [
        TokenSequence(50 * i + 1 + np.arange(n, dtype=np.int32), np.arange(n) > 0) for i, n in enumerate(lengths)
    ]
    return TokenDataset.from_sequences(sequences, PAD, packed_length, {})


def make_batches(dataset, rank=0, world_size=1, global_batch=4, micro=1, total=8, seed=3):
    return Batches(dataset, seed, global_batch, micro, rank, world_size, total)


def first_tokens(micro_batch):
    """The rows of a micro-batch by the first token; None for an empty one."""
    return [None if row[0] == PAD else int(row[0]) for row in micro_batch.input_ids]


def global_rows(dataset, world_size, step, **settings):
    """All ranks' micro-batches of a step, in the order of their global index."""
    batches = [make_batches(dataset, rank, world_size, **settings) for rank in range(world_size)]
    micro_batches = [micro_batch for b in batches for micro_batch in b.micro_batches(step)]
    assert [m.index for m in micro_batches] == list(range(len(micro_batches)))
    return micro_batches


def test_order_is_a_permutation_that_never_changes():
    for epoch in range(3):
        assert sorted(order(0, epoch, 100)) == list(range(100))
    assert order(0, 0, 100).dtype == np.int64
    assert len({order(seed, epoch, 100).tobytes() for seed in range(3) for epoch in range(3)}) == 9
    # Written down once: another order would make old checkpoints resume with other samples.
    assert order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert order(12345, 7, 8).tolist() == [0, 1, 4, 3, 2, 5, 7, 6]


def test_every_sample_once_an_epoch():
    dataset = make_dataset([3] * 10)
    batches = make_batches(dataset, global_batch=4, total=30)
    ids = [i for step in range(len(batches)) for i in batches.row_ids(step)]
    assert len(ids) == 30
    for epoch in range(3):
        assert ids[10 * epoch : 10 * epoch + 10] == order(3, epoch, 10).tolist()


@pytest.mark.parametrize("micro", [1, 2])
def test_same_global_order_for_every_world_size(micro):
    dataset = make_dataset([3, 9, 4, 12, 5, 8, 17])
    for step in range(4):
        settings = {"global_batch": 8, "micro": micro, "total": 30}
        expected = global_rows(dataset, 1, step, **settings)
        for world_size in (2, 4):
            found = global_rows(dataset, world_size, step, **settings)
            for one, other in zip(expected, found, strict=True):
                assert torch.equal(one.input_ids, other.input_ids)
                assert torch.equal(one.targets, other.targets)
                assert (one.num_targets, one.index) == (other.num_targets, other.index)


def test_any_step_alone_equals_the_step_in_a_run():
    dataset = make_dataset([3] * 7)
    run = make_batches(dataset, total=40)
    ids = [run.row_ids(step) for step in range(len(run))]
    for step in reversed(range(len(run))):
        assert make_batches(dataset, total=40).row_ids(step) == ids[step]


def test_last_step_is_filled_with_empty_rows():
    dataset = make_dataset([3] * 10)
    micro_batches = global_rows(dataset, 2, step=1, global_batch=8, micro=2, total=11)
    expected = [50 * i + 1 for i in make_batches(dataset, global_batch=8, total=11).row_ids(1)]
    assert len(expected) == 3
    assert [first_tokens(m) for m in micro_batches] == [expected[:2], [expected[2], None], [None, None], [None, None]]
    assert [m.num_targets for m in micro_batches] == [4, 2, 0, 0]
    assert micro_batches[3].input_ids.shape == (2, 8)
    assert len(make_batches(dataset, global_batch=8, total=11)) == 2
    with pytest.raises(IndexError, match="step 2 of 2"):
        make_batches(dataset, global_batch=8, total=11).micro_batches(2)


def test_unpacked_rows_by_hand():
    dataset = make_dataset([3, 9])
    (micro_batch,) = make_batches(dataset, global_batch=2, micro=2, total=2).micro_batches(0)
    short = first_tokens(micro_batch).index(1)
    assert micro_batch.input_ids.shape == (2, 16)  # 9 rounded up to a multiple of 8
    assert micro_batch.input_ids[short].tolist() == [1, 2, 3] + [PAD] * 13
    assert micro_batch.targets[short].tolist() == [2, 3] + [-100] * 14
    assert micro_batch.position_ids.tolist() == [list(range(16))] * 2
    assert micro_batch.num_targets == 2 + 8
    assert {micro_batch.input_ids.dtype, micro_batch.targets.dtype, micro_batch.position_ids.dtype} == {torch.int64}


def test_packed_row_by_hand():
    dataset = make_dataset([3, 4], packed_length=10)
    (micro_batch,) = make_batches(dataset, global_batch=1, total=1).micro_batches(0)
    assert micro_batch.input_ids.tolist() == [[1, 2, 3, 51, 52, 53, 54, PAD, PAD, PAD]]
    assert micro_batch.targets.tolist() == [[2, 3, -100, 52, 53, 54, -100, -100, -100, -100]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2]]
    assert micro_batch.num_targets == 5


@given(
    lengths=st.lists(st.integers(2, 16), min_size=1, max_size=12),
    packed_length=st.sampled_from([None, 16, 24]),
    micro=st.integers(1, 3),
    world_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
)
def test_an_epoch_predicts_every_target_once(lengths, packed_length, micro, world_size, accumulation):
    dataset = make_dataset(lengths, packed_length)
    settings = {"global_batch": micro * world_size * accumulation, "micro": micro, "total": len(dataset)}
    steps = len(make_batches(dataset, **{**settings, "world_size": world_size}))
    micro_batches = [m for step in range(steps) for m in global_rows(dataset, world_size, step, **settings)]
    assert len(micro_batches) == steps * world_size * accumulation
    check_every_target_once(lengths, micro_batches)


@given(
    lengths=st.lists(st.integers(2, 16), min_size=1, max_size=12),
    packed_length=st.sampled_from([None, 16]),
    micro=st.integers(1, 3),
    world_size=st.integers(1, 4),
)
def test_evaluation_predicts_every_target_once_on_equally_busy_ranks(lengths, packed_length, micro, world_size):
    dataset = make_dataset(lengths, packed_length)
    shares = [eval_batches(dataset, micro, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(m.index for share in shares for m in share) == list(range(world_size * len(shares[0])))
    check_every_target_once(lengths, [m for share in shares for m in share])


def check_every_target_once(lengths, micro_batches):
    predicted = []
    for m in micro_batches:
        assert m.num_targets == int((m.targets != -100).sum())
        for ids, targets, positions in zip(
            m.input_ids.tolist(), m.targets.tolist(), m.position_ids.tolist(), strict=True
        ):
            for t, target in enumerate(targets):
                if target != -100:
                    # The next token of the same sample, seen from the position it has in that sample.
                    assert ids[t + 1] == target == ids[t] + 1
                    assert positions[t] == (ids[t] - 1) % 50
                    predicted.append(target)
    assert sorted(predicted) == [50 * i + 1 + t for i, n in enumerate(lengths) for t in range(1, n)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_do_not_see_each_other(attention):
    """Hugging Face attention, given these positions and no mask, computes each sample as if it were alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    (packed,) = make_batches(make_dataset([5, 7], packed_length=16), global_batch=1, total=1).micro_batches(0)
    with torch.no_grad():
        together = model(packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits[0]
        for start, length in ((0, 5), (5, 7)):
            alone = model(packed.input_ids[:, start : start + length], use_cache=False).logits[0]
            torch.testing.assert_close(together[start : start + length], alone)
        # The check can fail: without the positions the second sample sees the first.
        mixed = model(packed.input_ids, use_cache=False).logits[0]
        assert (mixed[5:12] - together[5:12]).abs().max() > 1e-3


def test_batches_made_ahead_are_the_same():
    """Also where a step is not the one that was prepared; an error of the thread is raised where it is asked for."""
    batches = make_batches(make_dataset([3, 9, 4, 12, 5]), global_batch=2, total=9)
    ahead = BatchesAhead(batches, pin=False)
    for step in (0, 1, 2, 1, 4):
        for made, expected in zip(ahead.micro_batches(step), batches.micro_batches(step), strict=True):
            assert torch.equal(made.input_ids, expected.input_ids) and made.row_ids == expected.row_ids
            assert made.segments.bounds == expected.segments.bounds
    with pytest.raises(IndexError):
        ahead.micro_batches(5)
    ahead.close()
