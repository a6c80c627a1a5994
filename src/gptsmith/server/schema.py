"""Request and response bodies: OpenAI's fields, and this engine's own. Unknown fields are rejected by name.

OpenAI's fields that are not supported have the type None: they may be absent or null, and are rejected otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="The name of a model, as listed by /v1/models.")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = Field(None, description="Add a last chunk with token counts.")
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(Request):
    """The fields that completions and chat completions share."""

    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 always takes the most likely token.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Number of continuations per prompt.")
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id -> value added to its logit; -100 bans the token."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="Written to the log.")
    service_tier: Literal["auto", "default"] | None = None

    # extensions to OpenAI's API: pass them in extra_body with the official client
    top_k: int | None = Field(None, ge=1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="Generate this many and return the n with the highest mean log-probability.",
    )
    beams: int | None = Field(
        None, ge=1, le=32, description="Beam search with this many beams; requires temperature 0."
    )
    length_penalty: float | None = Field(None, ge=-10, le=10)
    early_stopping: bool | None = None
    stop_token_ids: list[Id] | None = None
    ignore_eos: bool | None = None
    overflow: Literal["error", "truncate", "shift"] | None = Field(
        None, description="If the context is full: reject, cut the start of the prompt, or drop the oldest tokens."
    )
    regex: str | None = Field(None, max_length=20_000, description="The output matches this regular expression.")
    grammar: str | None = Field(
        None, max_length=100_000, description="The output follows this grammar, in Lark or GBNF."
    )
    choice: list[str] | None = Field(
        None, min_length=1, max_length=1000, description="The output is one of these texts."
    )

    prompt_cache_key: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    moderation: None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="The schema is always enforced.")


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["json_object"]


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[Id] | list[list[Id]] = Field(description="One or more texts or lists of token ids.")
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Default 16.")
    echo: bool | None = Field(None, description="Start the output with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None

    suffix: None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    arguments: str = Field(description="A JSON object, encoded as a string.")


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


Content = str | list[TextPart]


class SystemMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class FunctionDefinition(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = Field(None, description="The schema is always enforced.")


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: FunctionName


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Default: up to the end of the context.")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="Allow several calls in one answer. Default true.")
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None

    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: None = None
    prediction: None = None
    reasoning_effort: None = None
    safety_identifier: None = None
    verbosity: None = None
    web_search_options: None = None


# The Responses API: what the official client sends for text and functions


class ResponsePart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = Field(None, description="Accepted as part of an earlier answer; ignored.")


class ResponseMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ResponsePart]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: None = None


class FunctionCall(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    namespace: None = None
    caller: None = None


class FunctionCallOutput(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ResponsePart]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ResponseFunction(FunctionDefinition):
    type: Literal["function"]


class ResponseNamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    name: str


class ResponseJsonSchema(JsonSchema):
    type: Literal["json_schema"]


class ResponseText(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Annotated[TextFormat | JsonObjectFormat | ResponseJsonSchema, Field(discriminator="type")] | None = None
    verbosity: None = None


class ResponseStreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Request):
    input: str | list[ResponseMessage | FunctionCall | FunctionCallOutput]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Returned with the answer.")
    parallel_tool_calls: bool | None = None
    tools: Annotated[list[ResponseFunction], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | None = None
    text: ResponseText | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: cut the start of a conversation that does not fit the context."
    )
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: Literal[False] | None = Field(None, description="Answers are not stored.")
    background: Literal[False] | None = None
    user: str | None = Field(None, max_length=512)
    service_tier: Literal["auto", "default"] | None = None

    # extensions to OpenAI's API
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    top_k: int | None = Field(None, ge=1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    regex: str | None = Field(None, max_length=20_000)
    grammar: str | None = Field(None, max_length=100_000)
    choice: list[str] | None = Field(None, min_length=1, max_length=1000)

    access_programs: None = None
    background_options: None = None
    context_management: None = None
    conversation: None = None
    image: None = None
    max_tool_calls: None = None
    moderation: None = None
    previous_response_id: None = None
    prompt: None = None
    prompt_cache_key: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning: None = None
    safety_identifier: None = None


class EmbeddingsRequest(Request):
    input: str | list[str] | list[Id] | list[list[Id]] = Field(description="One or more texts or lists of token ids.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: encoded little-endian float32."
    )
    dimensions: int | None = Field(None, ge=1, description="Must be the width of the model.")
    user: str | None = Field(None, max_length=512)


class TokenizeRequest(Request):
    """A text (prompt), or a conversation (messages) to render with the chat template."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Request):
    tokens: list[Id]


# Responses ------------------------------------------------------------------------------------------------------------


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gptsmith"
    loaded: bool = Field(description="False: it is loaded when it is first requested.")
    max_model_len: int | None = Field(None, description="Context length in tokens, once the model is loaded.")
    parent: str | None = Field(
        None, description="For an adapter, its model; for an alias, the model or adapter it stands for."
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetails


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    prompt: str
