"""What an emulated engine caches of a request: hashes of the blocks of its prompt and answer, chained as vLLM has them.

The emulator's tokens are four bytes of text each (a message begins a token of its own, and has at least one), or the
numbers that a prompt is given as. A block's hash is over its tokens and the hash of the block before it; whatever else
goes into a prompt by a chat template (roles, tools, names) is hashed where it stands, and takes no tokens.
"""

from hashlib import blake2b
from typing import Any

import orjson

TOKEN_BYTES = 4
_RENDERED = ("tools", "functions", "documents", "chat_template", "chat_template_kwargs", "cache_salt", "lora_name")


def block_hashes(request: dict[str, Any], chat: bool, answer: str, block_tokens: int) -> list[bytes]:
    """Hashes of the whole blocks of a request's prompt, which is one, with its answer after it."""
    named = {name: request[name] for name in ("model", *_RENDERED) if request.get(name) is not None}
    text, marks = bytearray(), [(0, _json(named))]  # marks: what is hashed before which token
    if chat:
        for message in [*request["messages"], {"role": "assistant", "content": answer}]:
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content or ""}]
            about = {name: value for name, value in message.items() if name != "content" and value is not None}
            marks.append((len(text) // TOKEN_BYTES, _json(about)))
            for part in parts:
                if isinstance(part, dict):
                    _append(text, str(part.get("text", "")).encode(errors="replace"))
    else:
        prompt = request["prompt"]
        if isinstance(prompt, str):
            _append(text, prompt.encode(errors="replace"))
        else:
            text += b"".join([(token & 0xFFFFFFFF).to_bytes(TOKEN_BYTES, "little") for token in prompt])
        _append(text, answer.encode())
    return _chained(bytes(text), marks, TOKEN_BYTES * block_tokens)


def _append(text: bytearray, said: bytes) -> None:
    """In whole tokens, at least one."""
    text += said + b"\0" * (-len(said) % TOKEN_BYTES if said else TOKEN_BYTES)


def _chained(text: bytes, marks: list[tuple[int, bytes]], size: int) -> list[bytes]:
    hashes, head, at = [], b"", 0
    for start in range(0, len(text) - size + 1, size):
        end = start + size
        block = text[start:end]
        while at < len(marks) and marks[at][0] * TOKEN_BYTES < end:
            token, mark = marks[at]
            block += b"%d %d %b" % (token * TOKEN_BYTES - start, len(mark), mark)
            at += 1
        head = blake2b(block, key=head, digest_size=16).digest()
        hashes.append(head)
    return hashes


def _json(value: object) -> bytes:
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # nested deeper than orjson writes
        return repr(value).encode(errors="replace")
