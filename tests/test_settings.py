"""What a checkpoint says about itself is read from its files, resolved once and written back."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.settings import check_template, fill_template, open_folder

MAIN, BERT = "config_sentence_transformers.json", "sentence_bert_config.json"
TOKENIZER, POOLING = "tokenizer_config.json", "1_Pooling/config.json"
SIDE_FILES = ("config.json", "modules.json", MAIN, BERT, TOKENIZER, POOLING)


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit(folder, name, **changes):
    """Change keys of a JSON file, or replace all of it."""
    path = folder / name
    value = changes.pop("whole", None) if "whole" in changes else json.loads(path.read_text())
    path.write_text(json.dumps(value | changes if isinstance(value, dict) else value))


@given(st.text(), st.text(), st.text(min_size=1))
def test_braces_of_users_are_plain_text(before, after, instruction):
    """A template has one field; whatever else stands in it or in the instruction is kept."""
    assert fill_template(f"{before}{{instruction}}{after}", instruction) == (
        before + instruction + after
    )
    assert not fill_template(f"{before}{{instruction}}{after}", "")


@pytest.mark.parametrize("template", ["", "{}", "{instruction }", "{instruction}" * 2])
def test_a_template_without_its_field_is_refused(template, folder):
    """One sentence when it is read, not a KeyError in the middle of a run."""
    with pytest.raises(
        ValueError, match=r"expected \{instruction\} in it once, found it [02] times"
    ):
        check_template(template)
    edit(folder, MAIN, instruction_template=template)
    with pytest.raises(ValueError, match=r"model: instruction_template: expected \{instruction\}"):
        open_folder(folder)
    edit(folder, MAIN, instruction_template="Instruct: {instruction}\nQuery: {query} {")
    assert open_folder(folder).settings.instruction_template.endswith("{query} {")


@pytest.mark.parametrize(
    ("prompts", "template"),
    [
        ({"query": "Instruct: find it\nQuery:"}, "Instruct: {instruction}\nQuery:"),
        ({"s2p": "Instruct: Find {it}. \n Query: "}, "Instruct: {instruction} \n Query: "),
        (
            {"query": "Q: ", "a": "Instruct:b\nQuery: ", "c": None},
            "Instruct:{instruction}\nQuery: ",
        ),
        ({"query": "Represent this: "}, "Instruct: {instruction} \n Query: "),
    ],
)
def test_the_template_is_read_off_the_stored_prompts(folder, prompts, template):
    """A stored prompt shows how an instruction is put; KaLM's form where nothing shows it."""
    edit(folder, MAIN, prompts=prompts, instruction_template=None)
    assert open_folder(folder).settings.instruction_template == template


CHANGE_VECTORS = [
    (BERT, {"do_lower_case": True}),
    (BERT, {"transformer_task": "fill-mask"}),
    (BERT, {"query_length": 32}),
    (BERT, {"config_args": {"rope_theta": 5.0}}),
    (BERT, {"processor_kwargs": {"truncation_side": "left"}}),
    (MAIN, {"truncate_dim": 8}),
    (MAIN, {"model_type": "SparseEncoder"}),
    (MAIN, {"similarity_fn_name": "maxsim"}),
    (MAIN, {"default_prompt_name": "unheard of"}),
    (TOKENIZER, {"truncation_side": "left"}),
    (TOKENIZER, {"split_special_tokens": True}),
    (TOKENIZER, {"add_prefix_space": True}),
    (POOLING, {"include_prompt": False}),
    ("config.json", {"partial_rotary_factor": 0.5}),
    ("config.json", {"hidden_act": "gelu"}),
]
DAMAGED = [
    ("config.json", {"rms_norm_eps": "1e-6"}),
    ("config.json", {"rms_norm_eps": 0}),
    ("config.json", {"rope_theta": False}),
    ("config.json", {"rope_theta": None}),
    ("config.json", {"rope_parameters": [1]}),
    ("config.json", {"rope_parameters": {"rope_theta": "x"}}),
    ("config.json", {"rope_parameters": {"rope_theta": None}}),
    ("config.json", {"max_position_embeddings": 5.5}),
    ("config.json", {"architectures": "Qwen2Model"}),
    ("config.json", {"layer_types": [1]}),
    ("config.json", {"auto_map": "custom.Model"}),
    ("config.json", {"model_type": ["qwen2"]}),
    ("config.json", {"whole": [1]}),
    ("modules.json", {"whole": {}}),
    ("modules.json", {"whole": []}),
    ("modules.json", {"whole": [{"path": ""}]}),
    ("modules.json", {"whole": ["Transformer"]}),
    ("modules.json", {"whole": [{"type": "sentence_transformers.models.Pooling", "path": "../x"}]}),
    (MAIN, {"prompts": []}),
    (MAIN, {"prompts": {"query": 1}}),
    (BERT, {"max_seq_length": "512"}),
    (BERT, {"max_seq_length": 0}),
    (BERT, {"modality_config": "text"}),
    (TOKENIZER, {"model_max_length": "512"}),
    (TOKENIZER, {"eos_token": 7}),
    (TOKENIZER, {"auto_map": ["a"]}),
    (POOLING, {"pooling_mode": {"mean": True}}),
    (POOLING, {"pooling_mode": [["mean"]]}),
    (POOLING, {"pooling_mode_mean_tokens": "yes"}),
]


@pytest.mark.parametrize(("file", "changes"), [*CHANGE_VECTORS, *DAMAGED])
def test_what_is_damaged_or_not_computed_is_one_sentence(folder, file, changes):
    """Never a traceback, never silence: the folder, what was expected, what was found."""
    edit(folder, file, **changes)
    with pytest.raises(ValueError, match=r"expected .*found|contradict|not built") as error:
        open_folder(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(data=st.data(), file=st.sampled_from(SIDE_FILES), value=JSON)
def test_any_value_anywhere_is_read_or_refused(tiny_model_dir, tmp_path_factory, data, file, value):
    """A value of any shape under any key of any side file: settings, or one sentence."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        shutil.copytree(tiny_model_dir, folder)
    path, whole = folder / file, (folder / file).read_bytes()
    stated = json.loads(whole)
    place = stated if isinstance(stated, dict) else data.draw(st.sampled_from(stated))
    from kalm_min import settings

    keys = sorted({key for fields in settings.FIELDS.values() for key in fields})
    place[data.draw(st.sampled_from(keys) | st.sampled_from([*place]))] = value
    path.write_text(json.dumps(stated if data.draw(st.integers(0, 9)) else value))
    sentence = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_folder(folder)
    except ValueError as error:
        sentence = str(error)
    finally:
        path.write_bytes(whole)
    assert "\n" not in sentence


def test_an_unknown_key_is_named_once(folder):
    """What is neither used, harmless nor refused stands in one warning; what is off says nothing."""
    edit(folder, "config.json", embedding_multiplier=12.0, off=False)
    edit(folder, BERT, novel="x")
    with pytest.warns(UserWarning, match="embedding_multiplier of config.json, novel of") as caught:
        open_folder(folder)
    assert len(caught) == 1
    assert "off" not in str(caught[0].message)


def test_what_libraries_write_is_known(folder):
    """The files of transformers and sentence-transformers of today give no warning."""
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(folder.parent / "theirs"))
    theirs, ours = open_folder(folder.parent / "theirs"), open_folder(folder)
    assert theirs.settings.causal == ours.settings.causal
    assert theirs.settings.pooling == ours.settings.pooling
    assert theirs.settings.max_length == ours.settings.max_length
    edit(folder, "config.json", _name_or_path="x", transformers_version="4.46", use_cache=True)
    edit(folder, "config.json", max_window_layers=24, rope_scaling=None, bos_token_id=[1, 2])
    edit(folder, TOKENIZER, errors="replace", padding_side="left", add_bos_token=False)
    assert open_folder(folder).settings == ours.settings


def test_every_setting_says_where_it_is_from(folder):
    """The caller, a file, an entry of the table, or a rule."""
    found = open_folder(folder, max_length=7)
    assert found.sources == {
        "causal": "config.json",
        "pooling": "modules.json",
        "max_length": "the caller",
        "instruction_template": MAIN,
        "end_of_text": TOKENIZER,
        "prompts": MAIN,
    }
    edit(folder, "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"}, is_causal=None)
    assert open_folder(folder).sources["causal"].startswith("released.json: gte-Qwen2")


def test_torch_is_not_needed(folder):
    """The parent process of an evaluation reads settings without importing torch."""
    code = "import sys; from kalm_min.settings import open_folder as o; o(sys.argv[1]); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, folder], check=True)
