"""Clients of others, unmodified, against a node: alone, and one whose engine is full, so that a peer answers.

vLLM's own benchmark is in tests/test_vllm.py.
"""

import asyncio
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clients
import pytest
from aiohttp import web
from stub_nodes import MODEL, Stub, net

PATIENCE_S = 600.0  # some take many seconds to be imported
TEXT, SAID = "w0 w1 w2 w3 w4", "What is the weather in Paris?"
ARGUMENTS = '{"city": "Paris"}'
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
RESPONSE = {
    "id": "resp_1", "object": "response", "created_at": 0, "status": "completed", "model": MODEL, "error": None,
    "incomplete_details": None, "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": 1.0,
    "tool_choice": "auto", "tools": [], "top_p": 1.0,
    "output": [{"type": "message", "id": "m", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": TEXT, "annotations": []}]}],
    "usage": {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12,
              "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}},
}  # fmt: skip


@dataclass
class Model(Stub):
    """An engine that answers as a model does which has a tool."""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        self.begun += 1
        if self.mode == "full":
            return web.json_response({"error": "full"}, status=503)
        reason = "tool_calls" if asked.get("tools") else "stop"
        names = {"id": "c", "created": 1, "model": MODEL}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": None if asked.get("tools") else TEXT}
            message |= {"tool_calls": [CALL]} if asked.get("tools") else {}
            choice = {"index": 0, "message": message, "finish_reason": reason}
            return web.json_response(names | {"object": "chat.completion", "choices": [choice], "usage": USAGE})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        if asked.get("tools"):
            deltas.append({"tool_calls": [{"index": 0, **CALL, "function": {"name": "weather", "arguments": ""}}]})
            deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": each}}]} for each in ARGUMENTS]
        else:
            deltas += [{"content": each} for each in TEXT]
        names |= {"object": "chat.completion.chunk"}
        choices = [[{"index": 0, "delta": each, "finish_reason": None}] for each in deltas]
        choices.append([{"index": 0, "delta": {}, "finish_reason": reason}])
        events = [json.dumps(names | {"choices": each}) for each in choices]
        if (asked.get("stream_options") or {}).get("include_usage"):
            events.append(json.dumps(names | {"choices": [], "usage": USAGE}))
        for each in (*events, "[DONE]"):
            await response.write(f"data: {each}\n\n".encode())
        return response


COMMON = f"""
import json, sys
url, model, text, said = sys.argv[1] + "/v1", {MODEL!r}, {TEXT!r}, {SAID!r}
asked = [{{"role": "user", "content": said}}]
tool = {{"type": "function", "function": {{"name": "weather", "parameters": {{
    "type": "object", "properties": {{"city": {{"type": "string"}}}}, "required": ["city"]}}}}}}
"""
OPENAI = """
import openai
client = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
assert [each.id for each in client.models.list()] == [model] and client.models.retrieve(model).id == model
whole = client.chat.completions.create(model=model, messages=asked)
assert whole.choices[0].message.content == text and whole.usage.completion_tokens == 5
parts = list(client.chat.completions.create(model=model, messages=asked, stream=True))
assert "".join(part.choices[0].delta.content or "" for part in parts) == text
assert parts[-1].choices[0].finish_reason == "stop"
parts = list(client.chat.completions.create(
    model=model, messages=asked, stream=True, stream_options={"include_usage": True}))
assert parts[-1].choices == [] and parts[-1].usage.total_tokens == 12
whole = client.chat.completions.create(model=model, messages=asked, tools=[tool])
[call] = whole.choices[0].message.tool_calls
assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
with client.chat.completions.stream(model=model, messages=asked, tools=[tool]) as stream:
    [call] = stream.get_final_completion().choices[0].message.tool_calls
assert json.loads(call.function.arguments) == {"city": "Paris"}
assert client.embeddings.create(model=model, input="hi").data[0].embedding == [0.5, 0.25]
assert client.responses.create(model=model, input="hi").output_text == text
events = [event.type for event in client.responses.create(model=model, input="hi", stream=True)]
assert events == ["response.created", "response.completed"]
for wrong, error in (({"model": "gpt"}, openai.NotFoundError), ({"stream": 3}, openai.BadRequestError)):
    try:
        client.chat.completions.create(**{"model": model, "messages": asked} | wrong)
        raise AssertionError(wrong)
    except error as failed:
        assert failed.code in ("404", "400") and failed.request_id
try:
    openai.OpenAI(base_url=url, api_key="bad", max_retries=0).models.list()
    raise AssertionError("bad")
except openai.AuthenticationError:
    pass
"""
LANGCHAIN = """
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
chat = ChatOpenAI(base_url=url, api_key="k", model=model, max_retries=0)
answer = chat.invoke(said)
assert answer.content == text and answer.usage_metadata["total_tokens"] == 12
parts = list(chat.stream(said, stream_usage=True))
assert "".join(part.content for part in parts) == text
assert sum(part.usage_metadata["total_tokens"] for part in parts if part.usage_metadata) == 12
[call] = chat.bind_tools([tool]).invoke(said).tool_calls
assert (call["name"], call["args"]) == ("weather", {"city": "Paris"})
whole = None
for part in chat.bind_tools([tool]).stream(said):
    whole = part if whole is None else whole + part
assert [each["args"] for each in whole.tool_calls] == [{"city": "Paris"}]
assert [each.content for each in chat.batch([said, said])] == [text, text]
made = OpenAIEmbeddings(base_url=url, api_key="k", model=model, check_embedding_ctx_length=False)
assert made.embed_query("hi") == [0.5, 0.25]
"""
LITELLM = """
import asyncio, litellm
how = {"model": f"openai/{model}", "api_base": url, "api_key": "k", "num_retries": 0}
whole = litellm.completion(messages=asked, **how)
assert whole.choices[0].message.content == text and whole.usage.completion_tokens == 5
parts = list(litellm.completion(messages=asked, stream=True, stream_options={"include_usage": True}, **how))
assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text
assert litellm.stream_chunk_builder(parts).usage.completion_tokens == 5
[call] = litellm.completion(messages=asked, tools=[tool], **how).choices[0].message.tool_calls
assert json.loads(call.function.arguments) == {"city": "Paris"}
parts = list(litellm.completion(messages=asked, tools=[tool], stream=True, **how))
[call] = litellm.stream_chunk_builder(parts).choices[0].message.tool_calls
assert json.loads(call.function.arguments) == {"city": "Paris"}
assert litellm.embedding(input=["hi"], **how).data[0]["embedding"] == [0.5, 0.25]

async def at_once():
    return await asyncio.gather(*(litellm.acompletion(messages=asked, **how) for _ in range(4)))

assert [each.choices[0].message.content for each in asyncio.run(at_once())] == [text] * 4
try:
    litellm.completion(messages=asked, **how | {"model": "openai/gpt"})
    raise AssertionError("gpt")
except litellm.NotFoundError:
    pass
"""
OTHERS: dict[str, Any] = {
    "/v1/embeddings": {"object": "list", "model": MODEL, "usage": {"prompt_tokens": 1, "total_tokens": 1},
                       "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]},
}  # fmt: skip


@dataclass
class WithResponses(Model):
    """It has responses, whole and streamed."""

    async def other(self, request: web.Request) -> web.StreamResponse:
        stream = request.path == "/v1/responses" and json.loads(await request.read()).get("stream")
        events = []
        for k, name in enumerate(("response.created", "response.completed")):
            said = json.dumps({"type": name, "sequence_number": k, "response": RESPONSE})
            events.append(f"event: {name}\ndata: {said}\n\n".encode())
        self.others = OTHERS | {"/v1/responses": events if stream else RESPONSE}
        return await super().other(request)


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What it says. Raises AssertionError for one that fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize("by", ["the own engine", "a peer"])
@pytest.mark.parametrize("name", ["openai", "langchain", "litellm"])
def test_a_client_in_python(name: str, by: str) -> None:
    python = clients.python()
    script = COMMON + {"openai": OPENAI, "langchain": LANGCHAIN, "litellm": LITELLM}[name]

    async def scene() -> None:
        stubs = [WithResponses()] if by == "the own engine" else [WithResponses(mode="full"), WithResponses()]
        async with net(*stubs, keys=[{"name": "user", "key": "k"}]) as n:
            command = [str(python), "-c", script, n.urls[0]]
            await asyncio.to_thread(run, command, clients.environment())
            assert stubs[-1].begun >= 4

    asyncio.run(scene())


async def curl(*arguments: str) -> str:
    return await asyncio.to_thread(run, ["curl", "-sS", "-H", "Authorization: Bearer k", *arguments])


@pytest.mark.parametrize("by", ["the own engine", "a peer"])
def test_curl(by: str, tmp_path: Path) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": SAID}]}
    large = tmp_path / "large.json"
    large.write_text(json.dumps(body | {"metadata": {"x": "y" * 500_000}}))

    async def scene() -> None:
        stubs = [Model()] if by == "the own engine" else [Model(mode="full"), Model()]
        async with net(*stubs, keys=[{"name": "user", "key": "k"}]) as n:
            chat, models = n.urls[0] + "/v1/chat/completions", n.urls[0] + "/v1/models"
            assert json.loads(await curl(models))["data"][0]["id"] == MODEL
            assert (await curl("-I", models)).startswith("HTTP/1.1 200 OK")
            # The type is that of a form, as curl has it for -d.
            for more in (["-d", json.dumps(body)], ["-H", "expect: 100-continue", "-d", f"@{large}"],
                         ["--http1.0", "-d", json.dumps(body)], ["--http2", "-d", json.dumps(body)],
                         ["--compressed", "-d", json.dumps(body)],
                         ["-H", "transfer-encoding: chunked", "-d", json.dumps(body)]):  # fmt: skip
                answer = json.loads(await curl(chat, *more))
                assert answer["choices"][0]["message"]["content"] == TEXT, answer
            for more in ([], ["--http1.0"]):
                said = await curl("-N", chat, *more, "-d", json.dumps(body | {"stream": True}))
                *events, done, nothing = said.split("\n\n")
                assert (done, nothing) == ("data: [DONE]", "") and len(events) == len(TEXT) + 2
            # One connection, after an error too.
            said = await curl("-d", "{", chat, "--next", "-sS", "-H", "Authorization: Bearer k", "-w",
                              "%{num_connects}", models)  # fmt: skip
            assert "not JSON" in said and said.endswith("0")

    asyncio.run(scene())
