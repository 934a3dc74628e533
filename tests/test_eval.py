"""`fastpref eval`: its estimators against what they estimate, and a tuned model beside its reference."""

import itertools
import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.trainer import cli
from fastpref.trainer.eval import EvalOptions, evaluate, load
from fastpref.trainer.figures import Figure, best_of, table, win_rates, write
from tests._trainer import make_tiny


def test_best_of_is_the_mean_of_all_draws():
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 3, 6):
        expected = [[max(draw) for draw in itertools.combinations(row.tolist(), k)] for row in scores]
        torch.testing.assert_close(best_of(scores, k), torch.tensor(expected, dtype=torch.float64).mean(1))


def test_win_rates_count_ties_half_and_leave_unknown_prompts_out():
    policy = torch.tensor([[1.0, 3.0], [2.0, 2.0], [math.nan, 9.0]])
    reference = torch.tensor([[1.0, 2.0], [2.0, 5.0], [0.0, 0.0]])
    # 1 = 1, 1 < 2, 3 > 1, 3 > 2; 2 = 2, 2 < 5 twice
    assert win_rates(policy, reference).tolist() == [0.625, 0.25]


def test_figure_is_mean_and_standard_error():
    values = torch.tensor([1.0, 2.0, 4.0])
    assert Figure.of(values) == Figure(7 / 3, pytest.approx(math.sqrt(7 / 3 / 3)), 3)
    assert math.isnan(Figure.of(values[:1]).error)
    assert f"{Figure(0.5, math.nan, 1):>8}" == "  0.5000" and f"{Figure(0.5, 0.25, 9)}" == "0.5000 ± 0.2500"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder with `model`, `pairs.jsonl` and `tuned`: the same model with a louder "good" in its head."""
    folder = tmp_path_factory.mktemp("eval")
    make_tiny(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator) * (parameter.ndim > 1))
    model.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    return folder


def count_of_good(prompts, completions, **_):
    return [float(text.split().count("good")) for text in completions]


def options(folder, **given):
    sources = {"model_name_or_path": str(folder / "tuned"), "ref_model_name_or_path": str(folder / "model")}
    small = {"max_completion_length": 6, "num_generations": 4, "max_prompts": 16, "per_device_eval_batch_size": 16}
    return EvalOptions(**{"dataset_name": str(folder / "pairs.jsonl"), **sources, **small, **given})


def logps_by_hand(folder, prompt, completion):
    """The log-probability of a completion and its EOS."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([[*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    return float(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def test_pairs_by_hand(tuned):
    found = evaluate(options(tuned, max_samples=5, max_prompts=0, beta=0.3))["policy"]
    margins = []
    for line in (tuned / "pairs.jsonl").read_text().splitlines()[:5]:
        row = json.loads(line)
        ratio = [
            logps_by_hand(tuned / "tuned", row["prompt"], row[side])
            - logps_by_hand(tuned / "model", row["prompt"], row[side])
            for side in ("chosen", "rejected")
        ]
        margins.append(0.3 * (ratio[0] - ratio[1]))
    expected = torch.tensor(margins)
    assert found["rewards/margins"].mean == pytest.approx(expected.mean().item(), abs=1e-5)
    assert found["rewards/accuracies"].mean == (expected > 0).float().mean()
    assert found["loss"].mean == pytest.approx(-torch.nn.functional.logsigmoid(expected).mean().item(), abs=1e-5)
    assert found["loss"].n == 5
    assert found.keys() == {"loss", "rewards/accuracies", "rewards/margins"}


def test_samples(tuned):
    found = evaluate(options(tuned, reward_funcs=[count_of_good]))
    policy, reference = found["policy"], found["reference"]
    assert {"score", "best_of_2", "best_of_4", "win_rate", "kl", "tokens"} <= policy.keys()
    assert reference.keys() == {"score", "best_of_2", "best_of_4", "tokens"}
    assert policy["score"].mean < policy["best_of_2"].mean < policy["best_of_4"].mean
    assert policy["kl"].mean > 0.1
    shown = table(found)
    assert "KL to the reference" in shown
    assert f"{policy['win_rate'].mean:.4f}" in shown


def test_a_model_beside_itself(tuned):
    same = str(tuned / "tuned")
    found = evaluate(options(tuned, ref_model_name_or_path=same, reward_funcs=[count_of_good], max_prompts=64))
    policy = found["policy"]
    assert policy["kl"].mean == 0
    assert policy["loss"].mean == pytest.approx(math.log(2))
    # its samples are not the reference's, but no better
    assert abs(policy["win_rate"].mean - 0.5) < 4 * policy["win_rate"].error
    assert policy["score"] != found["reference"]["score"]


def test_adapter_is_compared_with_its_base(tuned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tuned / "model")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tuned / "model").save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tuned / "model").save_pretrained(tmp_path / "merged")
    adapter = str(tmp_path / "adapter")
    own = evaluate(options(tuned, model_name_or_path=adapter, ref_model_name_or_path=None))
    merged = evaluate(options(tuned, model_name_or_path=str(tmp_path / "merged")))
    assert own["policy"]["kl"].mean > 0.05
    for key, figure in merged["policy"].items():
        assert own["policy"][key].mean == pytest.approx(figure.mean, rel=1e-3, abs=1e-4), key


def test_without_a_reference(tuned):
    found = evaluate(options(tuned, ref_model_name_or_path=None, reward_funcs=[count_of_good]))
    assert found["policy"].keys() == {"logps/accuracies", "score", "best_of_2", "best_of_4", "tokens"}
    assert found["reference"] == {}


def test_command_writes_json(tuned, tmp_path, capsys):
    file = tmp_path / "eval.json"
    words = ["--model_name_or_path", str(tuned / "tuned"), "--ref_model_name_or_path", str(tuned / "model")]
    words += ["--dataset", str(tuned / "pairs.jsonl"), "--max_completion_length", "4", "--max_prompts", "2"]
    assert cli.main(["eval", *words, "--num_generations", "2", "--output_file", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["policy"]["loss"]["n"] == 64
    assert written["options"]["max_prompts"] == 2
    shown = capsys.readouterr().out
    assert f"{written['policy']['loss']['mean']:.4f} ± {written['policy']['loss']['error']:.4f}" in shown
    assert cli.main(["eval", *words[:4]]) == 1
    assert "eval: dataset must be given; got none" in capsys.readouterr().err


def test_a_figure_without_an_error_is_null_in_json(tuned, tmp_path):
    given = options(tuned, max_samples=1, max_prompts=0)
    write(tmp_path / "eval.json", vars(given), evaluate(given))
    written = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert written["policy"]["loss"]["error"] is None
    assert written["policy"]["loss"]["n"] == 1 and written["policy"]["loss"]["mean"] > 0


def test_a_malformed_row_is_named_by_file_and_line(tuned, tmp_path):
    good = '{"prompt": "a film is", "chosen": " good", "rejected": " bad"}\n'
    file, tokenizer = tmp_path / "pairs.jsonl", AutoTokenizer.from_pretrained(tuned / "model")
    file.write_text(good + "\n" + good.replace('" good"', "3"))
    with pytest.raises(ValueError, match=rf"^tokenize_pairs: {file}, line 3: chosen must be a text"):
        load(options(tuned, dataset_name=str(file)), tokenizer)
    file.write_text('{"prompt": "a film is"}\n\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=rf"^tokenize_prompts: {file}, line 3: prompt must be a text"):
        load(options(tuned, dataset_name=str(file)), tokenizer)


def test_prompts_without_room_are_refused(tuned, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tuned / "model")
    with pytest.raises(ValueError, match=r"^eval: max_length must leave room for a prompt beside 6 new tokens; got 6$"):
        load(options(tuned, max_length=6), tokenizer)
    assert load(options(tuned, max_length=6, max_prompts=0), tokenizer)[1] == []
    # where nothing judges samples, none are drawn, and the pairs need no room for one
    pairs, prompts = load(options(tuned, max_length=6, ref_model_name_or_path=None), tokenizer)
    assert pairs and not prompts
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a film is"}')
    alone = {"dataset_name": tmp_path / "prompts.jsonl", "ref_model_name_or_path": None}
    with pytest.raises(ValueError, match=r"^eval: prompts alone want max_prompts above 0, and reward_funcs, "):
        load(options(tuned, **alone), tokenizer)
    assert load(options(tuned, **alone, reward_funcs="tests.test_eval:count_of_good"), tokenizer)[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_name_or_path": None}, "model_name_or_path must be given"),
        ({"num_generations": 0}, "num_generations must be at least 1; got 0"),
        ({"max_prompts": -1}, "max_prompts must be at least 0; got -1"),
        ({"temperature": 0.0}, "temperature and beta must be above 0; got 0.0 and 0.1"),
    ],
)
def test_refusals(tuned, given, message):
    with pytest.raises(ValueError, match=message):
        options(tuned, **given)
