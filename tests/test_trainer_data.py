"""Rows in, token ids out: what is read, where completions start, what is dropped, what is refused."""

import json
import random
from itertools import groupby

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastpref.trainer.collate import collate
from fastpref.trainer.data import Pair, load_preferences, sequences_of, tokenize_pairs
from fastpref.trainer.examples import Example, tokenize_examples, tokenize_labelled

ROW = {"prompt": "Is the film good?", "chosen": " Yes, it is good.", "rejected": " No."}
CHAT = {
    "prompt": [{"role": "user", "content": "Is the film good?"}],
    "chosen": [{"role": "assistant", "content": "Yes, it is good."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_bpe(merged=("Is the film good? Yes, it is good. No.",), **special):
    """A byte-level BPE that merges whatever repeats in `merged`, and can encode any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=names, show_progress=False)
    core.train_from_iterator([*merged] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", **{"eos_token": "</s>", **special})


@pytest.fixture
def tokenizer():
    return byte_bpe(chat_template=TEMPLATE)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# tokenizing


def test_text_is_tokenized_whole_and_ends_with_eos(tokenizer):
    (pair,), report = tokenize_pairs([ROW], tokenizer)
    eos = [tokenizer.eos_token_id]
    assert pair.prompt_ids == tokenizer(ROW["prompt"])["input_ids"]
    assert pair.prompt_ids + pair.chosen_ids == tokenizer(ROW["prompt"] + ROW["chosen"])["input_ids"] + eos
    assert pair.prompt_ids + pair.rejected_ids == tokenizer(ROW["prompt"] + ROW["rejected"])["input_ids"] + eos
    assert tokenizer.decode(pair.rejected_ids) == " No.</s>"
    assert (report.rows, report.kept, report.truncated, report.shifted, report.dropped) == (1, 1, 0, 0, {})
    assert report.tokens == {name: len(getattr(pair, f"{name}_ids")) for name in ("prompt", "chosen", "rejected")}


def test_eos_is_not_doubled(tokenizer):
    written = {**ROW, "chosen": ROW["chosen"] + "</s>"}
    assert tokenize_pairs([written], tokenizer)[0] == tokenize_pairs([ROW], tokenizer)[0]


def test_bos_follows_the_tokenizer():
    tokenizer = byte_bpe(bos_token="<s>")
    plain = tokenize_pairs([ROW], tokenizer)[0][0]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])]
    )
    pair = tokenize_pairs([ROW], tokenizer)[0][0]  # one that appends EOS too, to the prompt as well
    assert pair == Pair([1, *plain.prompt_ids], plain.chosen_ids, plain.rejected_ids)


def test_a_merge_across_the_boundary_belongs_to_both_completions():
    tokenizer = byte_bpe(merged=["unhappy unhappy"])
    row = {"prompt": "I am un", "chosen": "happy", "rejected": "sure"}
    (pair,), report = tokenize_pairs([row], tokenizer)
    assert tokenizer.decode(pair.prompt_ids) == "I am"
    assert tokenizer.decode(pair.chosen_ids) == " unhappy</s>"
    assert tokenizer.decode(pair.rejected_ids) == " unsure</s>"
    assert report.shifted == 1 and "In 1 the last tokens of the prompt differ" in str(report)


def test_messages_follow_the_chat_template(tokenizer):
    (pair,), report = tokenize_pairs([CHAT], tokenizer)
    assert tokenizer.decode(pair.prompt_ids) == "<|user|>Is the film good?</s>\n<|assistant|>"
    assert tokenizer.decode(pair.chosen_ids) == "Yes, it is good.</s>\n"  # the template's own end, nothing appended
    assert tokenizer.decode(pair.rejected_ids) == "No.</s>\n"
    assert report.shifted == 0


def test_a_prompt_rendered_differently_alone_ends_where_they_part(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("<|assistant|>", "<|assistant|><think>")
    (pair,), report = tokenize_pairs([CHAT], tokenizer)
    text = tokenizer.decode(pair.prompt_ids)
    assert text.endswith("<|assistant|>") and report.shifted == 1
    assert (
        text + tokenizer.decode(pair.chosen_ids) == "<|user|>Is the film good?</s>\n<|assistant|>Yes, it is good.</s>\n"
    )


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}, {"prompt": "Is the film good?"}])  # the last: ultrafeedback's
def test_the_shared_messages_are_the_prompt(tokenizer, prompt):
    whole = {**prompt, **{key: CHAT["prompt"] + CHAT[key] for key in ("chosen", "rejected")}}
    assert tokenize_pairs([whole], tokenizer)[0] == tokenize_pairs([CHAT], tokenizer)[0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Is the film good? Yes.", "Is the film good? No.", "Is the film good?"),  # the space goes with the word
        ("Is the film good?", "Is the film bad?", "Is the film"),
        ("No. No", "No. No. Yes", "No. N"),  # one begins with the other: each keeps a character at least
        ("Yes", "No", ""),
    ],
)
def test_the_shared_text_is_the_prompt(tokenizer, chosen, rejected, prompt):
    explicit = {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    implicit = {"chosen": chosen, "rejected": rejected}
    assert tokenize_pairs([implicit], tokenizer) == tokenize_pairs([explicit], tokenizer)


def test_tools_and_template_options_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ 'no' if tools is none else tools | length }} tools, {{ mood }}: " + TEMPLATE
    rows = [
        {**CHAT, "tools": '[{"type": "function"}]', "chat_template_kwargs": {"mood": "calm"}},
        {**CHAT, "tools": []},
    ]
    starts = [tokenizer.decode(p.prompt_ids).split("<")[0] for p in tokenize_pairs(rows, tokenizer)[0]]
    assert starts == ["1 tools, calm: ", "no tools, : "]


def test_truncation_keeps_the_start_and_is_counted(tokenizer):
    (whole,), _ = tokenize_pairs([ROW], tokenizer, max_length=None)
    n = len(whole.prompt_ids)
    (pair,), report = tokenize_pairs([ROW], tokenizer, max_length=n + len(whole.chosen_ids) - 1)
    assert pair == Pair(whole.prompt_ids, whole.chosen_ids[:-1], whole.rejected_ids)
    assert report.truncated == 1 and "1 cut to max_length." in str(report)
    assert tokenize_pairs([ROW], tokenizer, max_length=n + len(whole.chosen_ids))[0] == [whole]


def test_rows_without_a_signal_are_dropped_and_counted(tokenizer):
    long = {**ROW, "prompt": ROW["prompt"] * 20, "chosen": " Yes" * 999, "rejected": " No" * 999}
    same_start = {**ROW, "chosen": " Yes" * 50 + " a", "rejected": " Yes" * 50 + " b"}
    empty_chat = {**CHAT, "rejected": [{"role": "assistant", "content": None}]}
    rows = [ROW, long, {**ROW, "chosen": " \n"}, {**ROW, "rejected": ROW["chosen"]}, same_start, empty_chat, CHAT]
    pairs, report = tokenize_pairs(rows, tokenizer, max_length=40)
    assert pairs == tokenize_pairs([ROW, CHAT], tokenizer)[0]
    assert report.dropped == {
        "no completion token within max_length=40": [1],
        "an empty completion": [2, 5],
        "chosen and rejected identical": [3, 4],
    }
    assert (report.rows, report.kept) == (7, 2)
    assert "2 of 7 rows kept" in str(report) and "2 dropped: an empty completion (first: row 2)." in str(report)


def test_a_first_token_nothing_predicts_is_no_signal(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    rows = [{"prompt": "", "chosen": "</s>", "rejected": "No."}, ROW]  # </s> alone has no predecessor
    assert tokenize_pairs(rows, tokenizer, max_length=50)[1].dropped == {
        "no completion token within max_length=50": [0]
    }


def test_nothing_left_raises(tokenizer):
    with pytest.raises(ValueError, match=r"at least one usable pair; 0 of 1 rows kept.*an empty completion"):
        tokenize_pairs([{**ROW, "chosen": ""}], tokenizer)
    with pytest.raises(ValueError, match="at least one usable pair; 0 of 0 rows"):
        tokenize_pairs([], tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "row 1 must be a mapping with chosen and rejected; got str"),
        ({**ROW, "chosen": 3}, "row 1: chosen must be a text or a list of messages.*got int 3"),
        ({"prompt": "a", "chosen": "b"}, "row 1: rejected must be a text or a list of messages.*got NoneType"),
        ({**CHAT, "chosen": [{"content": "a"}]}, "row 1: chosen must be .* each with role and content; got list"),
        ({**ROW, "chosen": CHAT["chosen"]}, "row 1: chosen and rejected must both be text or both be messages"),
        ({**ROW, "prompt": CHAT["prompt"]}, "row 1: prompt must be text, as chosen and rejected are; got list"),
        ({**CHAT, "prompt": "a"}, "row 1: without a prompt of messages, .* must start with the same message"),
        ({**CHAT, "prompt": []}, "row 1: prompt must hold at least one message"),
        ({**CHAT, "chosen": CHAT["prompt"] + CHAT["chosen"]}, "row 1: .* must not repeat the prompt's messages"),
        ({**CHAT, "tools": "{"}, "row 1: tools must be a list of tools"),
        ({**CHAT, "chat_template_kwargs": "x"}, "row 1: chat_template_kwargs must be a mapping; got str"),
    ],
)
def test_malformed_rows_are_named(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        tokenize_pairs([ROW, row], tokenizer)


def test_a_malformed_row_of_a_file_is_named_by_its_line(tmp_path, tokenizer):
    bad = {**ROW, "chosen": 3}
    rows = load_preferences(write(tmp_path / "a.jsonl", f"{json.dumps(ROW)}\n\n{json.dumps(bad)}\n"))
    with pytest.raises(ValueError, match=r"tokenize_pairs: .*a\.jsonl, line 3: chosen must be a text"):
        tokenize_pairs(rows, tokenizer)
    rows = load_preferences(write(tmp_path / "a.json", json.dumps([ROW, bad])))
    with pytest.raises(ValueError, match=r"tokenize_pairs: .*a\.json, item 1: chosen must be a text"):
        tokenize_pairs(rows, tokenizer)


def test_what_the_tokenizer_must_have(tokenizer):
    with pytest.raises(ValueError, match="row 0 holds messages, which need a tokenizer with a chat template"):
        tokenize_pairs([CHAT], byte_bpe())
    with pytest.raises(ValueError, match="must have an EOS token"):
        tokenize_pairs([ROW], byte_bpe(eos_token=None))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="row 0: the chat template refuses these messages: roles must alternate"):
        tokenize_pairs([CHAT], tokenizer)


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_max_length_leaves_room_for_one_prediction(tokenizer, max_length):
    with pytest.raises(ValueError, match=f"max_length must be None or at least 2; got {max_length}"):
        tokenize_pairs([ROW], tokenizer, max_length=max_length)


# collating


def test_a_batch_by_hand():
    batch = collate(sequences_of([Pair([1, 2, 3], [4, 9], [6]), Pair([7], [8, 5], [2, 3])]), pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 9], [7, 8, 5, 9, 9], [1, 2, 3, 6, 9], [7, 2, 3, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch["targets"].tolist() == [  # a completion's own 9 is a target, padding is not
        [-100, -100, 4, 9, -100],
        [8, 5, -100, -100, -100],
        [-100, -100, 6, -100, -100],
        [2, 3, -100, -100, -100],
    ]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_targets_are_the_next_tokens_of_completions():
    generator = random.Random(0)

    def some(low):
        return [generator.randrange(50) for _ in range(generator.randrange(low, 12))]

    pairs = [Pair(some(0), some(2), some(2)) for _ in range(40)]  # an empty prompt among them
    batch = collate(sequences_of(pairs), 0)
    for i, ids in enumerate(batch["input_ids"]):
        pair = pairs[i % 40]
        completion = pair.chosen_ids if i < 40 else pair.rejected_ids
        start, end = len(pair.prompt_ids), len(pair.prompt_ids) + len(completion)
        assert batch["attention_mask"][i].sum() == end and ids[:end].tolist() == pair.prompt_ids + completion
        for t in range(len(ids)):
            inside = start <= t + 1 < end
            assert batch["targets"][i, t] == (ids[t + 1] if inside else -100)
    assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()


def test_a_collator_refuses():
    with pytest.raises(ValueError, match="at least one"):
        collate([], 0)
    with pytest.raises(TypeError, match="pad_token_id must be an int; got None"):
        collate([([1], [2])], None)


# examples: prompt and completion, messages, text, labels

TALK = [*CHAT["prompt"], *CHAT["chosen"]]
FROM = {"user": "human", "assistant": "gpt"}  # ShareGPT's words


def test_examples_of_every_format(tokenizer):
    rows = [
        {"prompt": "Is the film good?", "completion": " Yes, it is good."},
        {"prompt": CHAT["prompt"], "completion": CHAT["chosen"]},
        {"messages": TALK},
        {"text": "Is the film good? Yes, it is good."},
        {"prompt": "Is the film good?", "messages": TALK},
        {"conversations": [{"from": FROM[turn["role"]], "value": turn["content"]} for turn in TALK]},
    ]
    examples, report = tokenize_examples(rows, tokenizer)
    pair, chat = tokenize_pairs([ROW, CHAT], tokenizer)[0]
    assert examples[0] == Example(pair.prompt_ids, pair.chosen_ids)
    assert examples[1] == Example(chat.prompt_ids, chat.chosen_ids)
    assert examples[2] == Example([], chat.prompt_ids + chat.chosen_ids)  # everything is learned
    assert examples[3] == Example([], pair.prompt_ids + pair.chosen_ids)  # ends with EOS too
    assert examples[4] == examples[5] == examples[2]
    assert (report.rows, report.kept, report.dropped) == (6, 6, {})
    named, _ = tokenize_examples([{"body": "Yes"}], tokenizer, text_field="body")
    assert tokenizer.decode(named[0].completion_ids) == "Yes</s>"


def test_examples_without_a_signal_are_dropped_and_counted(tokenizer):
    fine = {"prompt": "Is", "completion": " the film good?"}
    long = {"prompt": "Is the film good?" * 20, "completion": " Yes"}
    rows = [fine, {**fine, "completion": " "}, long, {"text": " "}, {"messages": []}, {"text": "</s>"}]
    examples, report = tokenize_examples(rows, tokenizer, max_length=12)
    assert len(examples) == 1
    assert report.dropped == {
        "an empty completion": [1],
        "no completion token within max_length=12": [2, 5],
        "an empty text": [3],
        "an empty conversation": [4],
    }
    cut, report = tokenize_examples([fine], tokenizer, max_length=3)
    assert cut[0].n_tokens == 3 and report.truncated == 1


def test_labels_and_pairs_taken_apart(tokenizer):
    (pair,), _ = tokenize_pairs([ROW], tokenizer)
    rows = [
        {"prompt": ROW["prompt"], "completion": ROW[side], "label": side == "chosen"} for side in ("chosen", "rejected")
    ]
    expected = [Example(pair.prompt_ids, pair.chosen_ids, True), Example(pair.prompt_ids, pair.rejected_ids, False)]
    assert tokenize_labelled(rows, tokenizer)[0] == expected
    same = {**ROW, "rejected": ROW["chosen"]}
    examples, report = tokenize_labelled([ROW, same, ROW], tokenizer)
    # all chosen, then all rejected
    assert examples == [expected[0], expected[0], expected[1], expected[1]]
    assert report.dropped == {"chosen and rejected identical": [1]}
    assert "2 desirable, 2 undesirable" in str(report)


@pytest.mark.parametrize(
    ("tokenize", "row", "message"),
    [
        (tokenize_examples, "text", "row 1 must be a mapping; got str"),
        (tokenize_examples, {"prompt": "a"}, "row 1: completion must be a text or a list of messages.*got NoneType"),
        (tokenize_examples, {"prompt": "a", "completion": TALK}, "row 1: prompt must be messages, as completion is"),
        (tokenize_examples, {"prompt": [], "completion": TALK}, "row 1: prompt must hold at least one message"),
        (tokenize_examples, {"conversations": [{"from": "human"}]}, "row 1: messages must be .*each with role and"),
        (tokenize_examples, {"text": 3}, "row 1: text must be a text or a list of messages"),
        (
            tokenize_labelled,
            {"prompt": "a", "completion": "b", "label": 1},
            "row 1: label must be true or false; got 1",
        ),
        (tokenize_labelled, {"prompt": "a", "chosen": "b"}, "row 1: rejected must be a text"),
    ],
)
def test_malformed_examples_are_named(tokenizer, tokenize, row, message):
    fine = {"prompt": "Is", "completion": " the film good?", "label": True}
    with pytest.raises(ValueError, match=message):
        tokenize([fine, row], tokenizer)


MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "options", "learned"),
    [
        ({"messages": TALK + TALK}, {}, ["Yes, it is good.</s>", "Yes, it is good.</s>"]),
        ({"prompt": TALK + CHAT["prompt"], "completion": CHAT["rejected"]}, {}, ["No.</s>"]),
        (
            {"prompt": TALK + CHAT["prompt"], "completion": CHAT["rejected"]},
            {"completion_only_loss": False},
            ["Yes, it is good.</s>", "No.</s>"],
        ),
    ],
)
def test_what_the_assistant_says_is_learned(row, options, learned):
    marked = byte_bpe(chat_template=MARKED)
    (example,), _ = tokenize_examples([row], marked, assistant_only_loss=True, **options)
    (whole,), _ = tokenize_examples([row], marked)
    assert example.prompt_ids + example.completion_ids == whole.prompt_ids + whole.completion_ids
    assert example.learned[0] and len(example.learned) == len(example.completion_ids)
    said = [i if ok else None for i, ok in zip(example.completion_ids, example.learned, strict=True)]
    runs = [marked.decode([*ids]) for some, ids in groupby(said, lambda i: i is not None) if some]
    assert runs == learned and example.n_scored == sum(example.learned)


def test_what_the_assistant_says_must_be_marked(tokenizer):
    with pytest.raises(ValueError, match="row 0: assistant_only_loss needs a chat template that marks"):
        tokenize_examples([{"messages": TALK}], tokenizer, assistant_only_loss=True)
    with pytest.raises(ValueError, match="row 0: assistant_only_loss wants messages; got text"):
        tokenize_examples([{"text": "a"}], tokenizer, assistant_only_loss=True)
    rows = [{"messages": TALK}, {"messages": CHAT["prompt"]}]
    _, report = tokenize_examples(rows, byte_bpe(chat_template=MARKED), assistant_only_loss=True)
    assert report.dropped == {"no assistant token within max_length=1024": [1]}


def test_a_completion_is_wanted_where_only_it_is_learned(tokenizer):
    with pytest.raises(ValueError, match="row 0: completion_only_loss wants prompt and completion; got text"):
        tokenize_examples([{"text": "a"}], tokenizer, completion_only_loss=True)


def test_a_reward_model_leaves_out_long_pairs_and_reads_margins(tokenizer):
    rows = [{**ROW, "margin": 2}, {**ROW, "chosen": " Yes" * 99}]
    pairs, report = tokenize_pairs(rows, tokenizer, max_length=60, too_long="drop")
    assert [pair.margin for pair in pairs] == [2]
    assert report.dropped == {"longer than max_length=60": [1]}
    with pytest.raises(ValueError, match="row 0: margin must be a number; got 'big'"):
        tokenize_pairs([{**ROW, "margin": "big"}], tokenizer)
