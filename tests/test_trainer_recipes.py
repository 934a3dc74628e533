"""`sft`, `reward` and `kto` on a tiny random Llama: what they learn, how a step may be split, what is saved."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    T5ForSequenceClassification,
)

from fastpref.trainer import kto, reward, sft
from fastpref.trainer.metrics import read_metrics
from tests._trainer import (
    WORDS,
    assert_same_metrics,
    make_tiny,
    run_and_kill,
    run_processes,
)

RECIPES = {
    "sft": (sft.train, sft.SFTOptions, "examples"),
    "reward": (reward.train, reward.RewardOptions, "pairs"),
    "kto": (kto.train, kto.KTOOptions, "labelled"),
}
both = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


def options(recipe, tiny, output_dir, **given):
    """12 steps of 4, fast enough to watch the loss fall."""
    small = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "test_split_size": 16}
    small |= {"logging_steps": 3, "gradient_checkpointing": False}
    small |= {"cache_ref_log_probs": False} if recipe == "kto" else {}
    sources = {"model_name_or_path": str(tiny / "model"), "dataset_name": str(tiny / f"{RECIPES[recipe][2]}.jsonl")}
    return RECIPES[recipe][1](**{**small, **sources, "output_dir": str(output_dir), **given})


def train(given):
    return RECIPES[given.recipe][0](given)


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The runs that others are compared with: recipe -> (folder, outcome)."""
    folders = {recipe: tmp_path_factory.mktemp(recipe) for recipe in RECIPES}
    return {recipe: (folder, train(options(recipe, tiny, folder))) for recipe, folder in folders.items()}


def parameters(recipe, folder):
    auto = AutoModelForSequenceClassification if recipe == "reward" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32)


def test_sft_learns_and_its_loss_is_that_of_plain_pytorch(tiny, plain):
    _, outcome = plain["sft"]
    assert outcome.after["eval_loss"] < 0.75 * outcome.before["eval_loss"]
    assert outcome.after["eval_mean_token_accuracy"] > outcome.before["eval_mean_token_accuracy"]
    tokenizer = AutoTokenizer.from_pretrained(outcome.model_dir)
    model = parameters("sft", outcome.model_dir)
    given = options("sft", tiny, "unused")
    _, held_out = sft.load_examples(given, tokenizer, lambda said: None)
    total = tokens = 0
    for example in held_out:
        ids = torch.tensor([example.prompt_ids + example.completion_ids])
        start = len(example.prompt_ids)
        losses = F.cross_entropy(model(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="none")
        total, tokens = total + losses.sum().item(), tokens + len(losses)
    assert outcome.after["eval_loss"] == pytest.approx(total / tokens, abs=1e-5)


def test_reward_learns_and_loads_in_plain_transformers(tiny, plain):
    _, outcome = plain["reward"]
    assert outcome.after["eval_accuracy"] > 0.9
    model = parameters("reward", outcome.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(outcome.model_dir)
    texts = [f"a b film is {word} <eos>" for word in ("good", "bad")]
    good, bad = (model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts)
    assert good > bad
    _, held_out = reward.load_pairs(options("reward", tiny, "unused"), tokenizer, lambda said: None)
    margins = [
        model(torch.tensor([p.prompt_ids + p.chosen_ids])).logits
        - model(torch.tensor([p.prompt_ids + p.rejected_ids])).logits
        for p in held_out
    ]
    loss = -F.logsigmoid(torch.cat(margins)).mean().item()
    assert outcome.after["eval_loss"] == pytest.approx(loss, abs=1e-5)


def test_kto_learns_and_its_loss_is_that_of_plain_pytorch(tiny, plain):
    _, outcome = plain["kto"]
    assert outcome.before["eval_loss"] == pytest.approx(0.5, abs=1e-5)  # policy is reference: sigmoid(0)
    assert outcome.before["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert outcome.after["eval_rewards/margins"] > 0.1
    tokenizer = AutoTokenizer.from_pretrained(outcome.model_dir)
    policy, base = parameters("kto", outcome.model_dir), parameters("kto", tiny / "model")
    _, held_out = kto.load_examples(options("kto", tiny, "unused"), tokenizer, lambda said: None)

    @torch.no_grad()
    def logratio(prompt, completion):
        ids = torch.tensor([prompt + completion])
        sums = []
        for model in (policy, base):
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            sums.append(logps[len(prompt) - 1 :].sum())
        return sums[0] - sums[1]

    n = len(held_out)
    apart = []
    for i, example in enumerate(held_out):
        later = [held_out[(i + k) % n] for k in range(1, n)]
        other = next(e for e in later if e.prompt_ids != example.prompt_ids)
        apart.append(logratio(example.prompt_ids, other.completion_ids))
    kl = torch.stack(apart).mean().clamp(min=0)
    losses = []
    for example in held_out:
        above = 0.1 * (logratio(example.prompt_ids, example.completion_ids) - kl)
        losses.append(torch.sigmoid(-above if example.desirable else above))
    assert outcome.after["eval_kl"] == pytest.approx(kl.item(), abs=1e-4)
    assert outcome.after["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_metrics_have_the_names_of_trl(plain):
    common = {"step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens"}
    sides = {f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    own = {
        "sft": {"entropy", "mean_token_accuracy"},
        "reward": {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"},
        "kto": {"entropy", "kl", "rewards/margins", *sides},
    }
    for recipe, (folder, _) in plain.items():
        assert read_metrics(folder / "metrics.jsonl")[1].keys() == common | own[recipe]
        assert (folder / "training.png").stat().st_size > 10_000


@both
def test_a_step_is_the_same_however_it_is_split(recipe, tiny, plain, tmp_path):
    """Two processes with two accumulated batches each, of sequences of unequal lengths, make the run of one batch."""
    given = options(recipe, tiny, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    run_processes(given, n=2)
    assert_same_run(recipe, tmp_path, plain[recipe][0])


@pytest.mark.parametrize("recipe", ["kto", "reward"])
def test_fsdp2_makes_the_run_of_one_process_and_resumes(recipe, tiny, plain, tmp_path):
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 6}
    run_processes(options(recipe, tiny, tmp_path, **given), n=2, fsdp=True)
    assert_same_run(recipe, tmp_path, plain[recipe][0])
    metrics = (tmp_path / "metrics.jsonl").read_text()
    from_six = str(tmp_path / "checkpoint-6")
    run_processes(options(recipe, tiny, tmp_path, **given, resume_from_checkpoint=from_six), n=2, fsdp=True)
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def assert_same_run(recipe, folder, other):
    # means of the smallest and largest reward of a batch depend on the batch
    for ours, theirs in zip(*(read_metrics(f / "metrics.jsonl") for f in (folder, other)), strict=True):
        keys = ours.keys() - {"min_reward", "max_reward", "eval_min_reward", "eval_max_reward"}
        assert {k: ours[k] for k in keys} == pytest.approx({k: theirs[k] for k in keys}, abs=3e-4)
    split, whole = (parameters(recipe, f / "model").state_dict() for f in (folder, other))
    assert split.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=5e-5, msg=name)


@both
def test_killed_and_resumed_is_uninterrupted(recipe, tiny, tmp_path):
    """The adapter is saved, and loads in peft."""
    long = {"max_steps": 40, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 7, "use_peft": True}
    long |= {"lora_dropout": 0.3, "lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 0.02}
    train(options(recipe, tiny, tmp_path / "whole", **long))
    run_and_kill(options(recipe, tiny, tmp_path / "killed", **long), at=9)
    train(options(recipe, tiny, tmp_path / "killed", **long, resume_from_checkpoint=True))
    assert_same_metrics(tmp_path / "killed", tmp_path / "whole", rel=0, abs=0)
    base = parameters(recipe, tiny / "model") if recipe != "reward" else None
    if base is None:
        base = AutoModelForSequenceClassification.from_pretrained(tiny / "model", num_labels=1)
    adapters = [peft.PeftModel.from_pretrained(base, tmp_path / f / "model").state_dict() for f in ("whole", "killed")]
    trained = [name for name in adapters[0] if "lora_B" in name or "score.modules_to_save" in name]
    assert trained and all(adapters[0][name].any() for name in trained)
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in trained)


@pytest.mark.parametrize(
    ("recipe", "wrong", "message"),
    [
        ("sft", {"label_smoothing": 1.0}, r"sft: label_smoothing must be in \[0, 1\); got 1.0"),
        ("reward", {"center_rewards_coefficient": -1.0}, "reward: center_rewards_coefficient must be 0 or more"),
        ("kto", {"beta": -0.1}, "kto: beta must be > 0 and finite; got -0.1"),
        ("kto", {"undesirable_weight": -1.0}, "kto: undesirable_weight must be 0 or more; got -1.0"),
        ("kto", {"per_device_train_batch_size": 1}, "kto: kl needs at least 2 examples a step"),
    ],
)
def test_refusals(recipe, wrong, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(options(recipe, tiny, tmp_path, **wrong))


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (LlamaForSequenceClassification, 2, r"no model to be had from .* \(.*mismatched_sizes"),
        (T5ForSequenceClassification, 1, "the model must read prompt and answer as one text; .* has a decoder apart"),
    ],
)
def test_a_model_that_cannot_score_is_refused(kind, labels, message, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "d_kv": 8}
    config = kind.config_class(vocab_size=len(WORDS), num_labels=labels, pad_token_id=2, **sizes)
    kind(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"^reward: {message}"):
        train(options("reward", tiny, tmp_path / "run", model_name_or_path=str(tmp_path / "model")))


def test_prompts_are_learned_if_asked(tiny, tmp_path, plain):
    outcome = train(options("sft", tiny, tmp_path, completion_only_loss=False, max_steps=1))
    assert outcome.before["eval_loss"] != pytest.approx(plain["sft"][1].before["eval_loss"], abs=1e-3)


@pytest.mark.parametrize("padding_free", [True, False])
def test_only_what_the_assistant_says_is_learned(tiny, tmp_path, padding_free):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %} {% endfor %}"
    )
    talks = ["a b|good|c|very bad", "d|bad", "e f g|the good|h|film"]
    rows = [
        {
            "messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(talk.split("|"))],
            "chat_template_kwargs": {"chat_template": template},
        }
        for talk in talks
    ]
    data = tmp_path / "talks"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"dataset_name": str(data), "dataset_test_split": "test", "assistant_only_loss": True, "max_steps": 1}
    given |= {"per_device_train_batch_size": 3, "padding_free": padding_free, "logging_steps": 1}
    outcome = train(options("sft", tiny, tmp_path / "run", **given))
    model, losses = parameters("sft", tiny / "model"), []
    for talk in talks:
        turns = [[WORDS.index(word) for word in turn.split()] for turn in talk.split("|")]
        said = [False, True] * len(turns)
        turns = [ids + [1] * ok for ids, ok in zip(turns, said, strict=False)]
        mask = torch.tensor([ok for ids, ok in zip(turns, said, strict=False) for _ in ids])
        ids = torch.tensor([[i for turn in turns for i in turn]])
        losses += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")[mask[1:]].tolist()
    assert outcome.before["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    first, *_ = (line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line)
    assert first["loss"] == pytest.approx(outcome.before["eval_loss"], abs=1e-5)


def test_the_kl_takes_answers_of_other_prompts(tiny):
    class Run:
        options = kto.KTOOptions(max_length=4)

    same, other = [[1, 2], [1, 2]], [3]
    examples = [kto.Example(p, [i], True) for i, p in enumerate([*same, other])]
    found = [e.completion_ids for e in kto.mismatched(Run, examples, [0, 1, 2])]
    assert found == [[2], [2], [0]]
    long = [kto.Example([1, 2, 3], [4, 5, 6], True), kto.Example([7], [8, 9, 10], False)]
    assert [e.completion_ids for e in kto.mismatched(Run, long, [0, 1])] == [[8], [4, 5, 6]]


def test_a_single_held_out_example_goes_back_to_training(tiny, tmp_path, capsys):
    rows = (tiny / "labelled.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "twelve.jsonl"
    file.write_text("".join(rows[:8] + rows[-4:]))
    outcome = train(options("kto", tiny, tmp_path / "run", dataset_name=file, test_split_size=0.05, max_steps=1))
    assert outcome.before == {}
    shown = capsys.readouterr().out
    assert "held out  none" in shown and "12 to train on, 0 held out" in shown


def test_words_of_the_model(plain):
    ids = AutoTokenizer.from_pretrained(plain["kto"][1].model_dir)("a b film is", return_tensors="pt").input_ids
    logits = parameters("kto", plain["kto"][1].model_dir)(ids).logits[0, -1]
    assert max(logits[WORDS.index("good")], logits[WORDS.index("very")]) > logits[WORDS.index("bad")]
