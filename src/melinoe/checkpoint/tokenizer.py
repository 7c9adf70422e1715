"""Load a checkpoint's tokenizer, and refuse one that belongs to another model."""

from codecs import BOM_UTF8
from pathlib import Path
from shutil import copyfile
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from melinoe.checkpoint.files import first_line, hub_arguments, locate
from melinoe.errors import TokenizerError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_MORE_FILES = (
    "merges.txt", "vocab.txt", "spiece.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def load_tokenizer(name: str, config: PreTrainedConfig) -> Any:
    """Load a checkpoint's tokenizer, and check it against the model's vocabulary."""
    if not any(locate(str(name), filename) for filename in TOKENIZER_FILES):
        raise TokenizerError(
            f"{name} has no tokenizer; put the model's own tokenizer beside its weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **hub_arguments(str(name)), config=config, trust_remote_code=False
        )
        tokenizer("a")  # odd settings show at the first use
    except Exception as error:
        for filename in (*TOKENIZER_FILES, *_MORE_FILES):
            path = locate(str(name), filename)
            if path is not None and path.read_bytes().startswith(BOM_UTF8):
                raise TokenizerError(
                    f"{path} begins with a byte-order mark, which transformers cannot read; save "
                    "it as UTF-8 without one"
                ) from None
        raise TokenizerError(
            f"the tokenizer of {name} cannot be read ({first_line(error)}); download it again"
        ) from None
    check_tokenizer(tokenizer, config, str(name))
    return tokenizer


def copy_tokenizer(name: str, directory: Path) -> None:
    """Copy a checkpoint's tokenizer files, as they are, into *directory*."""
    for filename in (*TOKENIZER_FILES, *_MORE_FILES):
        if (path := locate(name, filename)) is not None:
            copyfile(path, directory / filename)


def check_tokenizer(tokenizer: Any, config: PreTrainedConfig, name: str) -> None:
    """Refuse a tokenizer that can give an id that the model has no embedding for."""
    text = config.get_text_config()
    if (rows := getattr(text, "vocab_size", None)) is None:
        return
    known = set(tokenizer.get_vocab().values())
    if not known:
        raise TokenizerError(f"the tokenizer of {name} is empty; use the model's own")
    if max(known) >= rows:
        raise TokenizerError(
            f"the tokenizer of {name} gives ids up to {max(known)} and the model has {rows} rows; "
            "it belongs to another model, use the model's own"
        )
    for role in ("bos", "eos", "pad"):
        wanted = getattr(text, f"{role}_token_id", None)
        for token in wanted if isinstance(wanted, list) else [wanted]:
            has_role = getattr(tokenizer, f"{role}_token_id", None) is not None
            if token is not None and has_role and token not in known:
                raise TokenizerError(
                    f"the model's {role} token {token} is not in the tokenizer of {name}; "
                    "it belongs to another model, use the model's own"
                )
