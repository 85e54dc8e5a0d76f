"""Prompts and labels: added tokens, chat template, positions of speech tokens, and loss mask."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastslm_jax.data import prompts

PROMPT = (
    "<|im_start|>user\n<|ASR|><|audio_bos|><|AUDIO|><|audio_eos|>\nwrite<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def test_nine_tokens_are_appended_in_a_fixed_order(tokenizer_folder):
    before = len(AutoTokenizer.from_pretrained(tokenizer_folder))
    tokenizer = prompts.load_tokenizer(tokenizer_folder)
    ids = tokenizer.convert_tokens_to_ids(
        [
            "<|AUDIO|>",
            "<|audio_bos|>",
            "<|audio_eos|>",
            "<|EN|>",
            "<|KO|>",
            "<|ASR|>",
            "<|AST|>",
            "<|SSUM|>",
            "<|SQQA|>",
        ]
    )
    assert ids == list(range(before, before + 9))
    assert len(tokenizer) == before + 9


def test_a_prompt_with_audio_and_an_answer(prompt_tokenizer):
    """<|AUDIO|> becomes six speech tokens; only the answer and <|im_end|> are in the loss."""
    tokenizer = prompt_tokenizer.tokenizer
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    at = ids.index(tokenizer.convert_tokens_to_ids("<|AUDIO|>"))
    answer = tokenizer("anna bought eggs", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1  # of the user's turn

    encoded = prompt_tokenizer.encode("asr", "write", "anna bought eggs", num_speech=6)
    assert encoded.tokens.tolist() == ids[:at] + [0] * 6 + ids[at + 1 :] + answer + [end]
    assert encoded.loss_mask.tolist() == [False] * (len(ids) + 5) + [True] * (len(answer) + 1)
    assert (encoded.speech_start, encoded.num_speech) == (at, 6)
    assert tokenizer.decode(ids) == PROMPT


@pytest.mark.parametrize(
    ("task", "content"),
    [
        ("asr", "<|ASR|><|audio_bos|><|AUDIO|><|audio_eos|>\nTranscribe the audio clip into text."),
        (
            "ast",
            "<|AST|><|audio_bos|><|AUDIO|><|audio_eos|>\nTranslate the audio clip into Korean.",
        ),
        ("ssum", "<|SSUM|><|audio_bos|><|AUDIO|><|audio_eos|>\nSummarize the audio clip."),
        (
            "sqqa",
            "<|SQQA|><|audio_bos|><|AUDIO|><|audio_eos|>\nAnswer the question in the audio clip.",
        ),
    ],
)
def test_default_instructions(prompt_tokenizer, task, content):
    assert prompt_tokenizer.user_turn(task) == content


def test_the_answer_of_a_clip_without_speech_is_the_end_of_turn(prompt_tokenizer):
    """Joined with other answers, it adds nothing, also no space."""
    assert prompt_tokenizer.answer_ids("") == [prompt_tokenizer.end_id]
    assert prompt_tokenizer.encode("asr", None, "", num_speech=3).loss_mask.sum() == 1
    both = prompt_tokenizer.answer_ids(["one", "two"])
    assert prompt_tokenizer.decode(both) == "one two"
    for answers in (["", "one", "two"], ["one", "", "", "two"], ["one", "two", ""]):
        assert prompt_tokenizer.answer_ids(answers) == both
    assert (prompts.joined("two"), prompts.joined("")) == (" two", "")


def test_prompts_without_an_answer_or_without_audio(prompt_tokenizer):
    prompt = prompt_tokenizer.encode("asr", "write", None, num_speech=6)
    assert len(prompt.tokens) == len(prompt_tokenizer.prompt_ids("asr", "write")) + 5
    assert not prompt.loss_mask.any()
    text = prompt_tokenizer.encode(None, "say hello", "hello", num_speech=0)
    expected = "<|im_start|>user\nsay hello<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
    assert prompt_tokenizer.tokenizer.decode(text.tokens) == expected
    assert (text.speech_start, text.num_speech) == (-1, 0)


def test_answers_are_decoded_to_text(prompt_tokenizer):
    ids = prompt_tokenizer.answer_ids("안녕하세요 anna")
    assert ids[-1] == prompt_tokenizer.end_id
    assert prompt_tokenizer.decode(np.array(ids)) == "안녕하세요 anna"


def test_invalid_prompts(prompt_tokenizer):
    with pytest.raises(prompts.PromptError, match="task 'vqa' is not one of asr, ast, ssum, sqqa"):
        prompt_tokenizer.prompt_ids("vqa")


CONTROL = ["<|im_end|>", "<|AUDIO|>", "<|endoftext|>", "a<|im_start|><|audio_bos|>b", "<|EN|><"]


def control_ids(tokenizer, ids):
    return [i for i in ids if i in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize("text", CONTROL)
def test_control_tokens_in_answers_are_text(prompt_tokenizer, text):
    answer = f"she said {text} twice"
    ids = prompt_tokenizer.answer_ids(answer)
    assert control_ids(prompt_tokenizer.tokenizer, ids) == [prompt_tokenizer.end_id]
    assert prompt_tokenizer.decode(ids) == answer
    assert prompt_tokenizer.answer_lengths([answer]).tolist() == [len(ids) - 1]
    joined = prompt_tokenizer.answer_ids(["one", answer])
    assert prompt_tokenizer.decode(joined) == f"one {answer}"


@pytest.mark.parametrize("text", CONTROL)
def test_control_tokens_in_instructions_are_text(prompt_tokenizer, text):
    """The prompt has the control tokens of any other instruction, and the same words."""
    tokenizer, instruction = prompt_tokenizer.tokenizer, f"say {text}, please"
    for task in ("asr", None):
        ids = prompt_tokenizer.prompt_ids(task, instruction)
        usual = prompt_tokenizer.prompt_ids(task, "say it, please")
        assert control_ids(tokenizer, ids) == control_ids(tokenizer, usual)
        usual_text = tokenizer.decode(usual)
        assert tokenizer.decode(ids) == usual_text.replace("say it, please", instruction)
    encoded = prompt_tokenizer.encode("asr", instruction, None, num_speech=6)
    usual = prompt_tokenizer.encode("asr", None, None, num_speech=6)
    assert encoded.speech_start == usual.speech_start


def test_unusable_tokenizers(tokenizer_folder, tmp_path):
    with pytest.raises(prompts.PromptError, match=f"{tmp_path}: cannot load a tokenizer"):
        prompts.load_tokenizer(tmp_path)
    with pytest.raises(
        prompts.PromptError, match="the added tokens reach id 308, but the model has only 305"
    ):
        prompts.load_tokenizer(tokenizer_folder, vocab_rows=305)
    plain = AutoTokenizer.from_pretrained(tokenizer_folder)
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(prompts.PromptError, match="the tokenizer has no chat template"):
        prompts.load_tokenizer(tmp_path / "plain")


TEMPLATES = {
    "broken": ("{% for m in messages %}{{ m.content }", "the chat template fails"),
    "raises": ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
    "undefined": ("{{ messages[0].content }}{{ rag.documents }}", "'rag' is undefined"),
    "too long": ("{% for i in range(10**9) %}a{% endfor %}", "the chat template fails"),
    "no words": ("hello", "drops or changes the user's words"),
    "other words": ("{{ messages[0].content | upper }}", "drops or changes the user's words"),
    "first words": ("{{ messages[0].content[:20] }}", "drops or changes the user's words"),
    "no audio": (
        "{{ messages[0].content }}{% if '<|AUDIO|>' in messages[0].content %}<|AUDIO|>{% endif %}",
        r"does not keep <\|AUDIO\|> as one token",
    ),
    "several": (
        [{"name": "rag", "template": "x"}, {"name": "tools", "template": "y"}],
        "multiple chat templates with no default",
    ),
    "number": (5, "the chat template fails"),
    "empty": ("", "the tokenizer has no chat template"),
}


@pytest.fixture
def tokenizer_copy(tokenizer_folder, tmp_path):
    """A copy of the tokenizer without its chat template."""
    folder = tmp_path / "copy"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", TEMPLATES)
def test_unusable_chat_templates(name, tokenizer_copy):
    template, message = TEMPLATES[name]
    change_json(tokenizer_copy / "tokenizer_config.json", chat_template=template)
    with pytest.raises(prompts.PromptError, match=f"{tokenizer_copy}: .*{message}") as raised:
        prompts.PromptTokenizer(prompts.load_tokenizer(tokenizer_copy)).prompt_ids("asr")
    assert len(str(raised.value).splitlines()) == 1


def test_a_template_that_trims_and_a_default_among_several(tokenizer_copy):
    trims = "<|im_start|>{{ messages[0].content | trim }}"
    templates = [{"name": "tools", "template": "x"}, {"name": "default", "template": trims}]
    change_json(tokenizer_copy / "tokenizer_config.json", chat_template=templates)
    tokenizer = prompts.PromptTokenizer(prompts.load_tokenizer(tokenizer_copy))
    ids = tokenizer.prompt_ids(None, " user\n")
    assert tokenizer.tokenizer.decode(ids) == "<|im_start|>user"


def without_end_of_turn(tokenizer):
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("im_end", "im_stop")
    vocab = tokenizer["model"]["vocab"]
    vocab["<|im_stop|>"] = vocab.pop("<|im_end|>")


def words_only(tokenizer):
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    tokenizer["model"] = model
    tokenizer["added_tokens"] = []


def unknown_model(tokenizer):
    tokenizer["model"]["type"] = "Syllables"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without_end_of_turn,
            "the tokenizer has a token for the end of a turn",
        ),
        (words_only, "turns 'Hello, 12 lamps.' into"),
        (unknown_model, "cannot load a tokenizer"),
        (dict.clear, "cannot load a tokenizer"),
    ],
)
def test_unusable_tokenizer_files(change, message, tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    fields = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    change(fields)
    (tmp_path / "copy/tokenizer.json").write_text(json.dumps(fields))
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    config = {name: value for name, value in config.items() if not name.endswith("_token")}
    (tmp_path / "copy/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(prompts.PromptError, match=message):
        prompts.load_tokenizer(tmp_path / "copy")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\xfa"])
def test_damaged_tokenizer_files(file, content, tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    (tmp_path / "copy" / file).write_bytes(content)
    with pytest.raises(prompts.PromptError, match="cannot load a tokenizer") as raised:
        prompts.load_tokenizer(tmp_path / "copy")
    assert len(str(raised.value).splitlines()) == 1


def test_a_vocabulary_beyond_the_embeddings(tokenizer_folder, tmp_path):
    """The added tokens have small ids, but others are too large."""
    tokenizer = prompts.load_tokenizer(tokenizer_folder)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(prompts.PromptError, match="id 309, but the model has only 309 embedding"):
        prompts.load_tokenizer(tmp_path, vocab_rows=309)
    assert len(prompts.load_tokenizer(tmp_path, vocab_rows=310)) == 310


def test_a_joined_answer_has_the_ids_of_the_whole_text(prompt_tokenizer):
    parts = ["anna bought two red lamps.", "in vienna, on friday", "7 o'clock", "안녕하세요"]
    assert prompt_tokenizer.answer_ids(parts) == prompt_tokenizer.answer_ids(" ".join(parts))
    lengths = [
        *prompt_tokenizer.answer_lengths(parts[:1]),
        *prompt_tokenizer.answer_lengths([f" {part}" for part in parts[1:]]),
    ]
    assert sum(lengths) + 1 == len(prompt_tokenizer.answer_ids(parts))


def test_fingerprints_identify_tokenizers(prompt_tokenizer, tokenizer_folder):
    same = prompts.PromptTokenizer(prompts.load_tokenizer(tokenizer_folder))
    assert same.fingerprint() == prompt_tokenizer.fingerprint()
    same.tokenizer.add_tokens(["<|more|>"])
    assert same.fingerprint() != prompt_tokenizer.fingerprint()


def with_files(tokenizer_copy, template="", **files):
    """The copied tokenizer with a chat template and JSON files."""
    change_json(tokenizer_copy / "tokenizer_config.json", chat_template=template or None)
    for name, fields in files.items():
        (tokenizer_copy / f"{name}.json").write_text(json.dumps(fields))
    return tokenizer_copy


LLAMA_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|endoftext|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)


def test_the_end_of_turn_is_that_of_the_chat_template(tokenizer_copy):
    """As in Llama 3: turns end with another token than eos_token, and generation with several."""
    folder = with_files(tokenizer_copy, LLAMA_TEMPLATE, generation_config={"eos_token_id": [0, 1]})
    tokenizer = prompts.PromptTokenizer(prompts.load_tokenizer(folder))
    names = tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.end_ids)
    assert names == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.answer_ids("anna")[-1] == tokenizer.end_id == 0


@pytest.mark.parametrize(
    ("files", "stop"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": 0}}, (0,)),
        ({"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": 1}}, (1,)),
        ({"generation_config": {"eos_token_id": 2}}, ()),
        ({"generation_config": {"eos_token_id": None}}, ()),
    ],
)
def test_ids_that_end_a_text(files, stop, tokenizer_copy):
    folder = with_files(tokenizer_copy, LLAMA_TEMPLATE.replace("endoftext", "im_end"), **files)
    tokenizer = prompts.PromptTokenizer(prompts.load_tokenizer(folder))
    assert (tokenizer.end_id, tokenizer.stop_ids) == (2, stop)


@pytest.mark.parametrize("value", ["2", [1, "2"], 2.5, {}])
def test_unusable_ids_that_end_a_text(value, tokenizer_copy):
    folder = with_files(tokenizer_copy, LLAMA_TEMPLATE, generation_config={"eos_token_id": value})
    with pytest.raises(
        prompts.PromptError, match=r"generation_config\.json: eos_token_id"
    ) as raised:
        prompts.load_tokenizer(folder)
    assert len(str(raised.value).splitlines()) == 1


def test_a_template_for_questions_only_ends_answers_with_eos_token(tokenizer_copy):
    template = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    folder = with_files(tokenizer_copy, template + "Q: {{ messages[0]['content'] }} A:")
    assert prompts.PromptTokenizer(prompts.load_tokenizer(folder)).end_id == 2


def test_the_built_in_chat_template(tokenizer_copy, prompt_tokenizer):
    with pytest.raises(prompts.PromptError, match=r"set config\.model\.chat_template to chatml"):
        prompts.load_tokenizer(with_files(tokenizer_copy))
    tokenizer = prompts.load_tokenizer(tokenizer_copy, chat_template="chatml")
    ids = prompts.PromptTokenizer(tokenizer).prompt_ids("ast")
    assert ids == prompt_tokenizer.prompt_ids("ast")


def test_chatml_without_its_tokens_ends_answers_with_eos_token(tokenizer_copy):
    """The markers of turns are text then."""
    path = with_files(tokenizer_copy) / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_", "<|x_"))
    change_json(tokenizer_copy / "tokenizer_config.json", eos_token="<|endoftext|>")
    loaded = prompts.load_tokenizer(tokenizer_copy, chat_template="chatml")
    tokenizer = prompts.PromptTokenizer(loaded)
    assert loaded.convert_ids_to_tokens(tokenizer.end_ids) == ["<|endoftext|>"]
    assert loaded.decode(tokenizer.prompt_ids(None, "hi")) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_ids_of_the_demo_model_are_those_of_its_training():
    tokenizer = prompts.PromptTokenizer(prompts.load_tokenizer("assets/demo_llm", 1536))
    assert (tokenizer.end_id, tokenizer.stop_ids, tokenizer.audio_id) == (2, (), 1472)
