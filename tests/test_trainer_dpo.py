"""`fastpref dpo` on a random Llama of 17 thousand parameters: what it learns, resumes, saves and refuses."""

import errno
import shutil
import tracemalloc
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
import transformers
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fastpref.losses.preference import PREFERENCE_LOSSES, Pairs
from fastpref.trainer import report
from fastpref.trainer.batches import items_of_step, my_batches
from fastpref.trainer.checkpoint import checkpoints
from fastpref.trainer.data import Pair, load_preferences, tokenize_pairs
from fastpref.trainer.dpo import DPOOptions, load_pairs, train
from fastpref.trainer.identity import checksum
from fastpref.trainer.metrics import MetricsLog, read_metrics
from fastpref.trainer.start import causal_lm, split_by_prompt
from tests import test_fused_lm_head
from tests._trainer import (
    TWO_PROCESSES,
    WORDS,
    assert_same_metrics,
    assert_same_weights,
    make_tiny,
    run_and_kill,
    run_command,
    run_processes,
    weights,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


def options(tiny, output_dir, **given):
    """12 steps of 4 pairs, fast enough to watch the loss fall."""
    small = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "test_split_size": 16}
    small |= {"logging_steps": 3, "gradient_checkpointing": False, "cache_ref_log_probs": False}
    sources = {"model_name_or_path": str(tiny / "model"), "dataset_name": str(tiny / "pairs.jsonl")}
    return DPOOptions(**{**small, **sources, "output_dir": str(output_dir), **given})


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The run that others are compared with, left whole."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(options(tiny, folder, save_steps=5))


def test_the_held_out_loss_falls_and_the_model_loads_in_plain_transformers(plain, tiny):
    folder, outcome = plain
    assert outcome.before["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert outcome.before["eval_rewards/accuracies"] is None
    assert outcome.after["eval_loss"] < 0.6
    assert outcome.after["eval_rewards/accuracies"] > 0.9
    model = AutoModelForCausalLM.from_pretrained(outcome.model_dir)
    assert type(model) is LlamaForCausalLM
    assert model.state_dict().keys() == weights(tiny / "model").keys()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = AutoTokenizer.from_pretrained(outcome.model_dir)("a b film is", return_tensors="pt").input_ids
    # the tuned model says what was preferred
    logits = model(ids).logits[0, -1]
    assert max(logits[WORDS.index("good")], logits[WORDS.index("very")]) > logits[WORDS.index("bad")]
    assert (folder / "training.png").stat().st_size > 10_000


def test_metrics_have_the_names_of_trl(plain):
    lines = read_metrics(plain[0] / "metrics.jsonl")
    sides = ["rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"]
    shared = {"loss", "rewards/accuracies", "rewards/margins", "entropy", "mean_token_accuracy", *sides}
    assert [line["step"] for line in lines] == [0, 3, 6, 9, 12, 12]
    assert lines[1].keys() == {"step", "epoch", "grad_norm", "learning_rate", "num_tokens", *shared}
    assert lines[0].keys() == {"step", "epoch", *(f"eval_{name}" for name in shared)}
    assert lines[4]["epoch"] == 1.0
    assert lines[0]["eval_rewards/accuracies"] is None


def test_the_loss_is_that_of_plain_pytorch(tiny, plain):
    """Step 12's held-out loss from the saved models' own logits."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    policy, reference = (AutoModelForCausalLM.from_pretrained(f) for f in (plain[1].model_dir, tiny / "model"))
    pairs, _ = tokenize_pairs(load_preferences(str(tiny / "pairs.jsonl")), tokenizer)
    _, held_out = split_by_prompt(pairs, 16, seed=42)

    @torch.no_grad()
    def logp(model, prompt, completion):
        ids = torch.tensor([prompt + completion])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return logps[len(prompt) - 1 :].sum()

    losses = []
    for pair in held_out:
        chosen, rejected = (
            logp(policy, pair.prompt_ids, ids) - logp(reference, pair.prompt_ids, ids)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)))
    assert plain[1].after["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


@pytest.mark.parametrize("split", [{"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 1}], ids=str)
def test_accumulated_batches_are_one_batch(tiny, plain, tmp_path, split):
    steps = 4 // split["per_device_train_batch_size"]
    train(options(tiny, tmp_path, **split, gradient_accumulation_steps=steps))
    # AdamW turns the rounding of a gradient near 0 into a step of any size up to the learning rate, 3e-3
    assert_same_weights(tmp_path / "model", plain[0] / "model", rtol=0, atol=2e-5)
    assert_same_metrics(tmp_path, plain[0], abs=2e-4)


def test_two_batches_of_one_pair_make_the_step_of_one_batch_of_two(tiny, tmp_path):
    once = {"max_steps": 1, "lr_scheduler_type": "constant", "test_split_size": 0}
    train(options(tiny, tmp_path / "1x2", per_device_train_batch_size=2, **once))
    train(options(tiny, tmp_path / "2x1", per_device_train_batch_size=1, gradient_accumulation_steps=2, **once))
    assert_same_weights(tmp_path / "1x2/model", tmp_path / "2x1/model", rtol=0, atol=1e-6)


def test_data_smaller_than_a_step_are_one_step(tiny, tmp_path):
    given = {"max_steps": -1, "num_train_epochs": 2, "test_split_size": 59, "save_steps": 1}
    for size in (5, 8):
        train(options(tiny, tmp_path / f"{size}", per_device_train_batch_size=size, **given))
    assert [path.name for path in checkpoints(tmp_path / "8")] == ["checkpoint-1", "checkpoint-2"]
    assert_same_weights(tmp_path / "5" / "model", tmp_path / "8" / "model", rtol=0, atol=0)


def test_two_processes_make_the_run_of_one(tiny, plain, tmp_path):
    given = options(tiny, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    run_command(given, launcher=TWO_PROCESSES)
    assert_same_weights(tmp_path / "model", plain[0] / "model", rtol=0, atol=2e-5)
    assert_same_metrics(tmp_path, plain[0], abs=2e-4)


def test_killed_and_resumed_is_uninterrupted(tiny, tmp_path, capsys):
    """SIGKILL somewhere past step 9, and a damaged last checkpoint: the metrics are the same to the byte."""
    long = {"max_steps": 60, "save_steps": 4, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 7}
    long |= {"use_peft": True, "lora_dropout": 0.3, "lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 0.02}
    train(options(tiny, tmp_path / "whole", **long))
    run_and_kill(options(tiny, tmp_path / "killed", **long), at=9)
    killed_at = read_metrics(tmp_path / "killed/metrics.jsonl")[-1]["step"]
    assert 9 <= killed_at < 60
    last = max((tmp_path / "killed").glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.split("-")[1]))
    (last / "state.pt").write_bytes((last / "state.pt").read_bytes()[:-1])
    capsys.readouterr()
    train(options(tiny, tmp_path / "killed", **long, resume_from_checkpoint=True))
    said = capsys.readouterr().out
    assert f"passing over {last}: state.pt is not as it was written" in said
    assert f"resuming  after step {int(last.name.split('-')[1]) - 4}," in said
    assert (tmp_path / "killed/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    # and an adapter is what was saved
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    adapters = [peft.PeftModel.from_pretrained(base, tmp_path / f / "model").state_dict() for f in ("whole", "killed")]
    changed = [name for name in adapters[0] if "lora_B" in name and adapters[0][name].any()]
    assert changed
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_resume_refuses_another_run(tiny, plain):
    with pytest.raises(ValueError, match=r"checkpoint-10, which was written with beta 0.1 \(now 0.2\)$"):
        train(options(tiny, plain[0], save_steps=5, beta=0.2, resume_from_checkpoint=True))


def test_resume_from_a_path_and_removal_of_what_came_later(tiny, plain, tmp_path):
    first = options(tiny, tmp_path, save_steps=5)
    train(first)
    train(options(tiny, tmp_path, save_steps=100, resume_from_checkpoint=str(tmp_path / "checkpoint-5")))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert (tmp_path / "metrics.jsonl").read_text() == (plain[0] / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="must be a checkpoint in output_dir"):
        train(options(tiny, tmp_path, resume_from_checkpoint=str(plain[0] / "checkpoint-5")))


def test_paths_enums_and_numpys_numbers_are_options_that_a_checkpoint_holds(tiny, tmp_path):
    sources = {"model_name_or_path": tiny / "model", "dataset_name": tiny / "pairs.jsonl"}
    given = {**sources, "lr_scheduler_type": transformers.SchedulerType.LINEAR, "learning_rate": np.float64(1e-3)}
    given |= {"max_steps": np.int64(2), "save_steps": 1, "per_device_train_batch_size": 2}
    train(DPOOptions(**given, output_dir=tmp_path))
    train(DPOOptions(**given, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-1"))
    assert (tmp_path / "checkpoint-2").is_dir()
    gone_on = DPOOptions(resume_from_checkpoint=tmp_path / "checkpoint-1", eval_strategy=False)
    assert gone_on.resume_from_checkpoint == str(tmp_path / "checkpoint-1")
    assert gone_on.eval_strategy == "no"


def test_resume_without_a_checkpoint_starts_and_says_so(tiny, tmp_path, capsys):
    train(options(tiny, tmp_path, max_steps=1, resume_from_checkpoint=True))
    assert f"no whole checkpoint in {tmp_path}: starting from the beginning" in capsys.readouterr().out


def test_resume_does_not_replace_a_finished_run_unasked(tiny, tmp_path):
    train(options(tiny, tmp_path, max_steps=1))
    there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = {"max_steps": 1, "resume_from_checkpoint": True, "learning_rate": 1e-5}
    with pytest.raises(ValueError, match=r"^dpo: output_dir .* holds a finished run \(model\) and no whole checkpoint"):
        train(options(tiny, tmp_path, **again))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == there
    train(options(tiny, tmp_path, **again, overwrite_output_dir=True))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 1
    assert (tmp_path / "metrics.jsonl").read_bytes() != there[tmp_path / "metrics.jsonl"]


def test_resume_starts_anew_what_was_killed_before_its_first_checkpoint(tiny, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 9.0}\n')
    (tmp_path / "checkpoint-1.partial").mkdir()
    train(options(tiny, tmp_path, max_steps=1, resume_from_checkpoint=True))
    assert "no whole checkpoint" in capsys.readouterr().out
    assert [line.get("eval_loss") == 9.0 for line in read_metrics(tmp_path / "metrics.jsonl")].count(True) == 0


def test_an_earlier_run_is_not_overwritten_unasked(tiny, plain, tmp_path):
    with pytest.raises(ValueError, match=r"holds a run \(model\).*--resume_from_checkpoint.*--overwrite_output_dir"):
        train(options(tiny, plain[0]))
    train(options(tiny, tmp_path, max_steps=2, save_steps=1))
    train(options(tiny, tmp_path, max_steps=1, overwrite_output_dir=True))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_only_the_last_checkpoints_are_kept(tiny, tmp_path):
    train(options(tiny, tmp_path, save_steps=3, save_total_limit=2))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]


def test_nonfinite_loss_stops_with_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    from fastpref.trainer import dpo

    original, calls = dpo.linear_preference_loss, []

    def breaks_at_step_8(*args, **kwargs):
        calls.append(kwargs["num_items"])
        out = original(*args, **kwargs)
        return out._replace(loss=out.loss * float("nan")) if sum(n is not None for n in calls) == 8 else out

    monkeypatch.setattr(dpo, "linear_preference_loss", breaks_at_step_8)
    message = rf"loss nan and gradient norm nan at step 8; .*Last whole checkpoint: {tmp_path}/checkpoint-6"
    with pytest.raises(FloatingPointError, match=message):
        train(options(tiny, tmp_path, save_steps=3))
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "checkpoint-6").values())


def test_a_nonfinite_step_is_left_out_if_asked(tiny, tmp_path, monkeypatch, capsys):
    from fastpref.trainer import dpo

    original, calls = dpo.linear_preference_loss, []

    def breaks_at_step_2(*args, **kwargs):
        out = original(*args, **kwargs)
        calls.append(kwargs["num_items"])
        return out._replace(loss=out.loss * float("inf")) if sum(n is not None for n in calls) == 2 else out

    monkeypatch.setattr(dpo, "linear_preference_loss", breaks_at_step_2)
    given = {"max_steps": 6, "logging_steps": 1, "lr_scheduler_type": "linear", "learning_rate": 6e-3}
    outcome = train(options(tiny, tmp_path, skip_nonfinite=True, **given))
    assert "step 2 left out: loss inf, gradient norm " in capsys.readouterr().out
    assert outcome.after["eval_loss"] < outcome.before["eval_loss"]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "learning_rate" in line]
    assert [line["step"] for line in lines if "loss" not in line] == [2]
    # the schedule ends with the run
    assert [line["learning_rate"] for line in lines] == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])


def test_ld_alpha_reads_the_reference_token_by_token(tiny, plain, tmp_path):
    outcomes = [train(options(tiny, tmp_path / str(alpha), ld_alpha=alpha)) for alpha in (1.0, 0.0)]
    assert outcomes[0].after == pytest.approx(plain[1].after, abs=1e-4)  # every token counts: plain DPO
    assert outcomes[1].after["eval_loss"] != pytest.approx(plain[1].after["eval_loss"], abs=1e-3)


def test_a_loss_without_a_reference_computes_none(tiny, tmp_path, capsys):
    given = options(tiny, tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=1.0, max_steps=1)
    before = train(given).before
    assert "reference scores" not in capsys.readouterr().out
    model, tokenizer = (auto.from_pretrained(tiny / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    _, held_out = load_pairs(given, tokenizer, lambda said: None)
    losses = []
    for pair in held_out:
        sides = []
        for ids in (pair.chosen_ids, pair.rejected_ids):
            whole = torch.tensor([pair.prompt_ids + ids])
            logps = model(whole).logits[0, :-1].log_softmax(-1).gather(-1, whole[0, 1:, None])
            sides.append(logps[len(pair.prompt_ids) - 1 :].mean())
        losses.append(-torch.nn.functional.logsigmoid(2.0 * (sides[0] - sides[1]) - 1.0))
    assert before["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_a_loss_written_by_the_user_trains(tiny, plain, tmp_path):
    def mine(pairs: Pairs, *, beta: float) -> Tensor:
        return -torch.nn.functional.logsigmoid(beta * (pairs.chosen_logratios - pairs.rejected_logratios))

    mine.couples = "pair"
    outcome = train(options(tiny, tmp_path, loss_type=mine))
    assert outcome.after == pytest.approx(plain[1].after, abs=1e-5)


def test_losses_mix_and_a_reference_is_optional(tiny, tmp_path):
    mixed = train(options(tiny, tmp_path / "mixed", loss_type=["sigmoid", "ipo"], loss_weights=[1.0, 0.1], max_steps=2))
    # log 2 + 0.1 (1 / (2 beta))^2 at margins of 0
    assert mixed.before["eval_loss"] == pytest.approx(0.6931 + 2.5, abs=1e-3)
    free = train(options(tiny, tmp_path / "free", reference_free=True, label_smoothing=0.1, max_steps=2))
    assert free.before["eval_rewards/accuracies"] is not None


def test_a_mixture_of_experts_trains_its_router_too(tiny, tmp_path):
    """With output_router_logits in its config the model's forward returns a router loss beside ours."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    config = transformers.MixtralConfig(vocab_size=len(WORDS), **sizes, **experts)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "moe")
    outcome = train(options(tiny, tmp_path / "run", model_name_or_path=str(tmp_path / "moe"), max_steps=2))
    aux = read_metrics(tmp_path / "run/metrics.jsonl")[1]["aux_loss"]
    assert aux > 0
    assert outcome.before["eval_loss"] == pytest.approx(0.6931 + 0.001 * outcome.before["eval_aux_loss"], abs=1e-4)


def test_mixed_precision_checkpointed_activations_and_a_tracker(tiny, tmp_path):
    given = options(tiny, tmp_path, bf16=True, gradient_checkpointing=True, report_to="tensorboard")
    run_processes(given)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["eval_loss"] < 0.6
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert weights(tmp_path / "model")["lm_head.weight"].dtype is torch.float32


def test_runs_of_several_precisions_share_a_process(tiny, tmp_path):
    losses = []
    for name, given in {"a": {"bf16": True}, "b": {}, "c": {"bf16": True}, "d": {}}.items():
        run = options(tiny, tmp_path / name, max_steps=1, per_device_train_batch_size=2, **given)
        losses.append(train(run).after["eval_loss"])
    assert losses[0] == losses[2] != losses[1] == losses[3]


def test_weights_in_bfloat16(tiny, tmp_path):
    outcome = train(options(tiny, tmp_path, dtype="bfloat16"))
    assert outcome.after["eval_loss"] < 0.6
    assert AutoModelForCausalLM.from_pretrained(outcome.model_dir).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0.0}, "dpo: beta must be > 0 and finite; got 0.0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1; got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more; got -1.0"),
        ({"max_steps": -1, "num_train_epochs": 0.0}, "num_train_epochs must be above 0"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 exclude each other"),
        ({"workspace": 0}, "dpo: workspace must be at least 1; got 0"),
        ({"lr_scheduler_type": "cosin"}, "dpo: unknown lr_scheduler_type 'cosin'; did you mean 'cosine'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "dpo: lr_scheduler_type cosine_with_min_lr with .*min_lr"),
        ({"eval_strategy": "epochs"}, "^dpo: eval_strategy: wanted one of no, steps, epoch; got 'epochs'"),
        ({"dtype": "fp16"}, "dpo: dtype: wanted one of float32, bfloat16, float16, auto; got 'fp16'"),
        ({"gradient_checkpointing": "selectiv"}, "wanted true or false or one of selective; got 'selectiv'"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, r"dpo: ld_alpha goes with sigmoid, .*got loss_type simpo"),
        ({"loss_type": "orpo", "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl' goes with sigmoid"),
        ({"loss_weights": [1.0, 2.0]}, "dpo: loss_weights must have one weight for each loss, 1; got 2"),
        ({"label_smoothing": 0.7}, r"^dpo: sigmoid: label_smoothing must be in \[0, 0.5\); got 0.7"),
        ({"loss_type": ["sft", "exo_pair"], "label_smoothing": 0.0}, "^dpo: exo_pair: label_smoothing must be > 0"),
        ({"loss_type": "dpop", "dpop_lambda": -1.0}, "^dpo: dpop: dpop_lambda must be "),
    ],
)
def test_options_are_checked_before_anything_runs(given, message):
    with pytest.raises(ValueError, match=message):
        DPOOptions(**given)


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_every_loss_takes_its_defaults(loss_type):
    assert DPOOptions(loss_type=loss_type).loss_names == [loss_type]


def test_a_loss_written_by_the_user_is_not_called_by_the_options():
    DPOOptions(loss_type=[Mock(side_effect=AssertionError, __name__="own", __signature__=None), "sigmoid"])


def test_an_option_of_another_loss_is_refused():
    with pytest.raises(TypeError, match=r"dpo: 'simpo_gamma' is no option of sigmoid, whose options .*label_smoothing"):
        DPOOptions(simpo_gamma=1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test_split_size": 64}, "64 held-out examples leave nothing to train on"),
        ({"loss_type": "sigmiod"}, "did you mean 'sigmoid'"),
        ({"model_name_or_path": "./nowhere"}, r"dpo: no tokenizer to be had from './nowhere' \(no such folder\)"),
        ({"report_to": "wandb"}, "dpo: report_to wandb needs: pip install wandb"),
    ],
)
def test_what_cannot_run_is_refused_in_words(tiny, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        train(options(tiny, tmp_path, **given))


def test_a_folder_without_tokenizer_or_weights_is_named(tiny, tmp_path):
    folder = tmp_path / "model"
    for missing, pattern in {"weights": "*.safetensors", "tokenizer": "tokenizer*"}.items():
        shutil.copytree(tiny / "model", folder, dirs_exist_ok=True)
        for file in folder.glob(pattern):
            file.unlink()
        with pytest.raises(ValueError, match=f"dpo: no {missing.replace('weights', 'model')} to be had from .*model"):
            train(options(tiny, tmp_path / "run", model_name_or_path=str(folder)))


def test_samples_stay_within_the_positions_of_the_model():
    class Words:
        eos_token_id = None

        def decode(self, ids, **_):
            return str(len(ids))

    model = test_fused_lm_head.tiny("gpt2", n_positions=32, eos_token_id=None)
    assert report.continuations(model, Words(), [[5] * 40, [6] * 3]) == [["16", "16"], ["3", "16"]]


def test_metrics_say_what_json_cannot_and_a_full_disk(tmp_path):
    log = MetricsLog(Accelerator(cpu=True), tmp_path / "m.jsonl", steps=9, steps_per_epoch=3, keep_through=None)
    values = {"loss": 1.0, "rewards/margins": 0.0, "rewards/accuracies": 0.5, "learning_rate": 0.1}
    log(1, {**values, "grad_norm": float("inf")})
    assert read_metrics(tmp_path / "m.jsonl")[0]["grad_norm"] == "inf"
    log._file = Mock(write=Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"MetricsLog: could not write .*m.jsonl: .*No space left"):
        log(2, {**values, "grad_norm": 1.0})


def test_metrics_go_on_in_a_new_file_where_the_old_one_is_gone(tmp_path):
    log = MetricsLog(Accelerator(cpu=True), tmp_path / "m.jsonl", steps=9, steps_per_epoch=3, keep_through=4)
    log(5, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [5]


def test_checksum_is_of_every_item_and_never_holds_the_text_of_all():
    items = [Pair([i, 2, 3], [4] * 50, [5] * 50) for i in range(2000)]
    found = checksum(items)
    assert checksum(list(items)) == found
    for i in (0, 1000, 1999):
        assert checksum([*items[:i], replace(items[i], chosen_ids=[7]), *items[i + 1 :]]) != found
    assert checksum(items[::-1]) != found
    assert checksum(items[:-1]) != found
    tracemalloc.start()
    checksum(items)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < len(repr(items)) / 20


def test_order_is_a_function_of_seed_and_epoch():
    epochs = [[items_of_step(step, 10, 3, seed=s) for step in range(1, 7)] for s in (1, 1, 2)]
    assert epochs[0] == epochs[1] != epochs[2]
    first, second = ([i for step in epochs[0][at : at + 3] for i in step] for at in (0, 3))
    assert first != second
    assert len(set(first)) == len(set(second)) == 9  # no pair twice, and one of ten left out


def test_processes_share_a_step_without_gap_or_overlap():
    class Process:
        num_processes = 2

        def __init__(self, index):
            self.process_index = index

    shares = [list(my_batches(Process(index), list(range(12)), 3)) for index in (0, 1)]
    assert shares == [[([0, 1, 2], False), ([6, 7, 8], True)], [([3, 4, 5], False), ([9, 10, 11], True)]]


def test_no_prompt_is_on_both_sides_of_the_split():
    pairs = [Pair([i // 3], [i], [99]) for i in range(30)]
    kept, held_out = split_by_prompt(pairs, 7, seed=0)
    assert len(held_out) == 9  # three whole prompts
    assert sorted([*kept, *held_out], key=lambda p: p.chosen_ids) == pairs
    assert not {p.prompt_ids[0] for p in kept} & {p.prompt_ids[0] for p in held_out}
    assert split_by_prompt(pairs, 0, seed=0) == (pairs, [])


@pytest.mark.parametrize("prompts", [[[1]] * 40, [[1]] * 20 + [[2]] * 20, [[1]] * 39 + [[2]]])
def test_where_prompts_are_too_few_to_hold_out_whole_rows_are_drawn(prompts, capsys):
    pairs = [Pair(prompt, [i], [99]) for i, prompt in enumerate(prompts)]
    kept, held_out = split_by_prompt(pairs, 2, seed=0)
    assert (len(kept), len(held_out)) == (38, 2)
    assert sorted([*kept, *held_out], key=lambda p: p.chosen_ids) == pairs
    assert "2 of 40 drawn one by one" in capsys.readouterr().out


def test_a_large_prompt_stays_where_smaller_ones_will_do():
    pairs = [Pair([max(i, 30)], [i], [99]) for i in range(60)]
    for seed in range(40):
        kept, held_out = split_by_prompt(pairs, 6, seed=seed)
        assert 6 <= len(held_out) <= 12
        assert not {p.prompt_ids[0] for p in kept} & {p.prompt_ids[0] for p in held_out}


def test_an_adapter_is_no_model_to_start_from(tmp_path):
    """Its reference would silently be the base under it."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^dpo: model_name_or_path must be a whole model; .* is an adapter\."):
        causal_lm(DPOOptions(), str(tmp_path), None)
