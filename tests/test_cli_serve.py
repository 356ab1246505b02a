"""The options of the commands that talk."""

from expecttest import assert_expected_inline

from tests.test_cli import help_text


def test_help_of_chat(capsys):
    assert_expected_inline(
        help_text(capsys, "chat").partition("\noptions\n")[2],
        """\
-h,
--help show this help message and exit
--system STR what the model is told first. (default: '')
--max-length INT tokens of the whole conversation; 0 for the model's positions, at most 8192. (default: 0)
--max-new-tokens INT the most tokens of an answer. (default: 1024)
--dtype {keep,float32,bfloat16,float16} of the weights; those that are always float32 stay so. (default: keep)
--device STR "auto" is cuda where there is one, else cpu. (default: auto)
--temperature FLOAT 0 takes the likeliest token each time. (default: 1.0)
--top-k INT draw among this many likeliest tokens; 0 for all. (default: 0)
--top-p FLOAT draw among the fewest likeliest tokens with this much probability together; 1 for all. (default: 1.0)
--min-p FLOAT draw among the tokens with at least this share of the likeliest one's probability. (default: 0.0)
--repetition-penalty FLOAT divides the logits of tokens in prompt and text; 1 for none. (default: 1.0)
--presence-penalty FLOAT subtracted once from the logits of tokens in the text. (default: 0.0)
--frequency-penalty FLOAT subtracted from the logits of tokens in the text as often as they are there. (default: 0.0)
--seed INT the same seed writes the same text; any signed 64-bit integer. (default: 0)
--logit-bias [INT FLOAT [INT FLOAT ...]] token ids and what is added to their logits, in pairs. (default: )""",
    )


def test_help_of_serve(capsys):
    assert_expected_inline(
        help_text(capsys, "serve").partition("\noptions\n")[2],
        """\
-h,
--help show this help message and exit
--host STR the address to listen at; 0.0.0.0 for all. (default: 127.0.0.1)
--port INT the port to listen at. (default: 8000)
--name STR what the model is called; the folder's name where empty. (default: '')
--capacity INT texts that are written at once. (default: 16)
--max-length INT tokens of prompt and text together; 0 for the model's positions, at most 8192. (default: 0)
--max-queue INT texts that may wait; more are refused with status 429. (default: 256)
--prefix-mib INT memory for common beginnings, in MiB, which are then read once; 0 for none. (default: 256)
--chunk-length INT tokens of prompts that are read at once, which bounds the memory. (default: 4096)
--draft-tokens INT tokens that the prediction module drafts a step for each text, which stays the same. (default: 0)
--compile,
--no-compile compile the step first, which pays on cuda. (default: False)
--dtype {keep,float32,bfloat16,float16} of the weights; those that are always float32 stay so. (default: keep)
--device STR "auto" is cuda where there is one, else cpu. (default: auto)""",
    )
