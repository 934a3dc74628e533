"""Rows from files, folders and the hub: what is read, of which split, what is refused and how it is named."""

import json

import datasets
import pytest

from fastpref.trainer.data import load_preferences, tokenize_pairs
from fastpref.trainer.data_files import split_to_judge
from tests.test_trainer_data import CHAT, ROW, TEMPLATE, byte_bpe, write


def test_jsonl_rows_keep_order_and_columns(tmp_path):
    rows = [{**ROW, "prompt": f"é {i}", "score": i} for i in range(5)]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # blank lines between
    assert load_preferences(write(tmp_path / "a.jsonl", "\ufeff" + text)) == rows


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ROW, ROW]),
        "\ufeff\n" + json.dumps([ROW, ROW], indent=1),
        f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n",
    ],
)
def test_json_is_an_array_or_lines(tmp_path, text):
    assert load_preferences(write(tmp_path / "a.json", text)) == [ROW, ROW]


def test_parquet(tmp_path):
    datasets.Dataset.from_list([ROW, CHAT | ROW]).to_parquet(tmp_path / "a.parquet")
    assert load_preferences(str(tmp_path / "a.parquet")) == [ROW, ROW]


def test_parquet_of_messages_survives_tokenizing(tmp_path):
    tokenizer = byte_bpe(chat_template=TEMPLATE)
    datasets.Dataset.from_list([CHAT]).to_parquet(tmp_path / "a.parquet")
    rows = load_preferences(str(tmp_path / "a.parquet"))
    assert tokenize_pairs(rows, tokenizer)[0] == tokenize_pairs([CHAT], tokenizer)[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", f"{json.dumps(ROW)}\n{{broken\n", r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", f"{json.dumps(ROW)}\n\n[1]\n", r"a\.jsonl, line 3: a row must be a JSON object; got list"),
        (
            "a.jsonl",
            '{"question": 1, "chosen": 2}',
            "line 1: columns wanted: chosen and rejected.*got question, chosen",
        ),
        ("a.json", f"[{json.dumps(ROW)}, {{}}]", r"a\.json, item 1: columns wanted: chosen and rejected.*got none"),
        ("a.json", f"[{json.dumps(ROW)}", r"a\.json: not valid JSON"),
        (
            "a.jsonl",
            '{"chosen": "\\ud800", "rejected": "\\ud83d\\ude00"}',
            "line 1: not valid JSON.*surrogates",
        ),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.parquet", "text", "not a readable Parquet file"),
        ("a.csv", "chosen,rejected\n1\n", r"a\.csv is not a readable CSV file: .*Expected 2 columns, got 1"),
        ("a.csv", "prompt,answer\na,b\n", r"a\.csv: columns wanted: chosen and rejected.*got prompt, answer"),
        ("a.tsv", "chosen\trejected", r"a file must end in \.jsonl, \.json, \.parquet, \.csv; got .*a\.tsv"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_preferences(write(tmp_path / name, text))


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"chosen": "caf\xe9", "rejected": ""}\n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        load_preferences(str(tmp_path / "a.jsonl"))


def test_parquet_without_the_columns(tmp_path):
    datasets.Dataset.from_list([{"text": "a", "label": 1}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"columns wanted: chosen and rejected.*got text, label"):
        load_preferences(str(tmp_path / "a.parquet"))


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    for name in ("train-1.jsonl", "train-0.jsonl", "test.jsonl", "training_notes.json"):
        write(tmp_path / name, json.dumps({**ROW, "prompt": name}))
    write(tmp_path / "README.md", "not data")
    assert [r["prompt"] for r in load_preferences(str(tmp_path))] == ["train-0.jsonl", "train-1.jsonl"]
    assert [r["prompt"] for r in load_preferences(str(tmp_path), split="test")] == ["test.jsonl"]
    with pytest.raises(ValueError, match=r"no file for the split 'dev' in .*; it holds test\.jsonl, train-0\.jsonl"):
        load_preferences(str(tmp_path), split="dev")


def test_what_is_judged_is_the_test_split_where_there_is_one(tmp_path, monkeypatch):
    file = write(tmp_path / "train.jsonl", json.dumps(ROW))
    assert split_to_judge(file) == split_to_judge(str(tmp_path)) == "train"
    write(tmp_path / "test-0.jsonl", json.dumps(ROW))
    assert split_to_judge(str(tmp_path)) == "test"
    assert split_to_judge(str(tmp_path / "gone.jsonl")) == "train"
    of_hub = {"someone/pairs": ["train", "test"], "someone/prompts": ["train", "dev"]}
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: of_hub[name])
    assert [split_to_judge(name) for name in of_hub] == ["test", "train"]

    def unreachable(*_):
        raise OSError("unreachable")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(ValueError, match=r"^split_to_judge: someone/pairs is no file .* its splits: unreachable"):
        split_to_judge("someone/pairs")


def test_a_folder_without_split_names_is_train(tmp_path):
    write(tmp_path / "b.jsonl", json.dumps(ROW))
    write(tmp_path / "a.json", json.dumps([ROW]))
    assert load_preferences(str(tmp_path)) == [ROW, ROW]


def test_paths_that_do_not_fit(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(ROW))
    with pytest.raises(ValueError, match="a single file has only the split 'train'; got 'test'"):
        load_preferences(path, split="test")
    with pytest.raises(ValueError, match="config belongs to hub datasets; got config='en'"):
        load_preferences(path, config="en")
    with pytest.raises(FileNotFoundError, match=r"no file or folder pairs\.jsonl"):
        load_preferences("pairs.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it holds no file that ends in"):
        load_preferences(str(tmp_path / "empty"))


def test_other_names_go_to_the_hub(monkeypatch):
    calls = []
    answer = datasets.Dataset.from_list([ROW])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or answer)
    assert load_preferences("someone/pairs", split="test", config="en") is answer
    assert calls == [(("someone/pairs",), {"name": "en", "split": "test"})]
    answer = datasets.Dataset.from_list([{"text": "a"}])
    with pytest.raises(ValueError, match=r"someone/pairs: columns wanted: chosen and rejected.*got text"):
        load_preferences("someone/pairs")

    def offline(*_, **__):
        raise ConnectionError("unreachable")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"someone/pairs is no file or folder here, and the hub .*: unreachable"):
        load_preferences("someone/pairs")


def test_csv_rows_are_texts_whatever_they_hold(tmp_path):
    rows = [{"prompt": '2 + 2,\n"é"', "chosen": "4", "rejected": "", "margin": 1.5, "label": True}]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    assert load_preferences(str(tmp_path / "a.csv")) == rows


def test_saved_datasets_are_read_by_split(tmp_path):
    sides = {name: datasets.Dataset.from_list([{**ROW, "prompt": name}] * 2) for name in ("train", "test")}
    datasets.DatasetDict(sides).save_to_disk(tmp_path / "both")
    sides["train"].save_to_disk(tmp_path / "one")
    for split in sides:
        assert [row["prompt"] for row in load_preferences(str(tmp_path / "both"), split=split)] == [split] * 2
    assert [row["prompt"] for row in load_preferences(str(tmp_path / "one"))] == ["train"] * 2
    assert [split_to_judge(str(tmp_path / name)) for name in ("both", "one")] == ["test", "train"]
    with pytest.raises(ValueError, match=r"^load_rows: no split 'dev' in .*both; it holds train, test$"):
        load_preferences(str(tmp_path / "both"), split="dev")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "text")
    with pytest.raises(ValueError, match=r"text: columns wanted: chosen and rejected.*got text"):
        load_preferences(str(tmp_path / "text"))


def test_a_copy_of_a_hub_dataset_has_its_files_in_folders(tmp_path):
    for name in ("data/train-0.jsonl", "data/test-0.jsonl", "dev/0.jsonl", ".cache/train-1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, json.dumps({**ROW, "prompt": name}))
    write(tmp_path / "README.md", "not data")
    for split, name in {"train": "data/train-0.jsonl", "test": "data/test-0.jsonl", "dev": "dev/0.jsonl"}.items():
        assert [row["prompt"] for row in load_preferences(str(tmp_path), split=split)] == [name]
    assert split_to_judge(str(tmp_path)) == "test"
