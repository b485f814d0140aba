"""`python -m kalm_min.check MODEL` shows what was understood, and from where."""

import json
import shutil

from kalm_min import check
from kalm_min.config import run


def test_a_model_is_described(tiny_model_dir, tmp_path, capsys):
    """Settings with their sources, a sample, sentence-transformers' vectors, warnings, dtypes."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    path = folder / "config_sentence_transformers.json"
    stated = json.loads(path.read_text()) | {"prompts": {"query": "Instruct: see\nQuery:"}}
    del stated["instruction_template"]
    path.write_text(json.dumps(stated | {"novel": 1}))
    (tmp_path / "texts.txt").write_text("the cat\n\na dog\nblue birds\nthe cat\n")
    arguments = [str(folder), "--texts", str(tmp_path / "texts.txt"), "--dtype", "bfloat16"]
    arguments += ["--output", str(tmp_path / "out.md")]
    assert run(check.CheckConfig, check.check, arguments, program="check", positional="model") == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out.md").read_text()
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["causal"] == ["'True'", "config.json"]
    assert rows["max_length"] == ["'32'", "sentence_bert_config.json"]
    assert rows["instruction_template"][-3:] == ["prompts", "in", path.name]
    assert "float32 in the file, bfloat16 would serve here" in text
    assert text.count("novel of config_sentence_transformers.json") == 1
    assert "'The cat sat on a mat.' is read as ['T', 'he'" in text
    assert "sentence-transformers, without remote code: cosine 1.000000 or more" in text
    assert "bfloat16 beside float32, 3 texts: cosine 0.99" in text
    assert text.splitlines()[-3:][0][:4] == "0.99"


def test_what_cannot_be_opened_is_one_sentence(tiny_model_dir, tmp_path, capsys):
    """The same sentence that from_pretrained gives."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "modules.json").write_text("{}")
    assert run(check.CheckConfig, check.check, [str(folder)], program="c", positional="model") == 2
    assert "expected a list of modules, found an object" in capsys.readouterr().err
