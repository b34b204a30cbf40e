"""Generation by the PyTorch model that ships with exports: as steps made by hand, whatever prompts are read in."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.longllama import Plain, close, padded, small, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_gradients")


def test_generation_of_padded_rows_equals_manual_steps_and_single_rows():
    model, ids, mask = small(), tokens(3, 12), torch.ones((3, 12), dtype=torch.long)
    mask[0, :5], mask[2, :7] = 0, 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
    plain, manual, fed = Plain(model), ids, ids
    for _ in range(24):
        fed = plain(fed, mask)[:, -1:].argmax(dim=-1)
        manual, mask = torch.cat([manual, fed], dim=1), torch.cat([mask, torch.ones((3, 1), dtype=torch.long)], dim=1)
    assert generated.tolist() == manual.tolist()
    for row, pad in ((0, 5), (2, 7)):
        alone = model.generate(ids[row : row + 1, pad:], max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert alone[0, -4:].tolist() == generated[row, 12:16].tolist()  # later their windows are cut elsewhere


def test_sampling_and_no_cache_and_continued_generation():
    model, ids = small(), tokens(2, 30)
    arguments = {"max_new_tokens": 6, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(1)
    assert model.generate(ids, do_sample=True, top_k=5, **arguments).shape == (2, 36)
    cached = model.generate(ids, do_sample=False, return_dict_in_generate=True, **arguments)
    assert isinstance(cached.past_key_values.get_seq_length(), int) and cached.past_key_values.get_seq_length() == 35
    on = torch.cat([cached.sequences, tokens(2, 3, 1)], dim=1)
    continued = model.generate(on, past_key_values=cached.past_key_values, max_new_tokens=3, eos_token_id=None)
    plain = Plain(model)
    plain(ids)
    for i in range(30, 35):
        plain(on[:, i : i + 1])
    assert continued[:, 39].tolist() == plain(on[:, 35:])[:, -1].argmax(dim=-1).tolist()
    short = model.generate(ids[:, :6], max_new_tokens=3, eos_token_id=None)
    assert model.generate(ids[:, :6], max_new_tokens=3, eos_token_id=None, use_cache=False).tolist() == short.tolist()


@pytest.mark.parametrize("way", ("last_context_length", "prefill_chunk_size", "memory first"))
def test_generation_from_a_prompt_read_otherwise(way):
    model, prompt, plain = small(), tokens(2, 60), Plain(small())
    arguments = {"max_new_tokens": 5, "eos_token_id": None, "attention_mask": torch.ones_like(prompt)}
    if way == "last_context_length":
        arguments["last_context_length"] = 4
        logits = plain(prompt, last=4)
    elif way == "prefill_chunk_size":
        arguments["prefill_chunk_size"] = 10
        logits = [plain(part) for part in prompt.split(10, dim=1)][-1]
    else:
        arguments["past_key_values"] = model(prompt, use_cache=False, logits_to_keep=1).past_key_values
        plain(prompt, use_cache=False)
        prompt = tokens(2, 6, 1)
        arguments["attention_mask"] = torch.ones_like(prompt)
        logits = plain(prompt)
    manual = prompt
    for _ in range(5):
        manual = torch.cat([manual, logits[:, -1:].argmax(dim=-1)], dim=1)
        logits = plain(manual[:, -1:])
    assert model.generate(prompt, **arguments).tolist() == manual.tolist()


def test_beams():
    model, ids = small(), tokens(2, 20)
    arguments = {"num_beams": 3, "max_new_tokens": 14, "eos_token_id": None, "do_sample": False}
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    for row in range(2):
        assert model.generate(ids[row : row + 1], **arguments)[0].tolist() == together[row].tolist()
    beams = [(0.0, ids[:1])]  # the same search, every step from the whole history
    for _ in range(14):
        candidates = []
        for score, history in beams:
            plain = Plain(model)
            logits = plain(history[:, :20])
            for i in range(20, history.shape[1]):
                logits = plain(history[:, i : i + 1])
            best = logits[0, -1].log_softmax(dim=0).topk(6)
            for value, token in zip(best.values.tolist(), best.indices, strict=True):
                candidates.append((score + value, torch.cat([history, token.view(1, 1)], dim=1)))
        beams = sorted(candidates, key=lambda candidate: -candidate[0])[:3]
    assert together[0].tolist() == beams[0][1][0].tolist()


def test_rows_of_the_cache_are_moved_repeated_and_chosen():
    model, ids, mask = small(), tokens(3, 40), padded(3, 40, "left")
    step, rows = tokens(3, 1, 1), torch.tensor([2, 0, 0])
    expected = model(step, past_key_values=model(ids, mask).past_key_values).logits
    cache = model(ids, mask).past_key_values
    cache.reorder_cache(rows)
    close(model(step[rows], past_key_values=cache).logits, expected[rows], 1e-5)
    cache = model(ids[:2], mask[:2]).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 3]))
    close(model(step[:2], past_key_values=cache).logits, expected[:2], 1e-5)
    with pytest.raises(NotImplementedError, match="cropped"):
        cache.crop(-1)
