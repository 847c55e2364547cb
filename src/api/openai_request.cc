#include "src/api/openai_request.h"

#include <fmt/ranges.h>

#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "src/api/api_error.h"
#include "src/api/request_fields.h"
#include "src/base/clock.h"

namespace tandem::api {
namespace {

constexpr int64_t kMaxTokenCount = 1L << 31;  // of max_tokens and min_tokens, before the context is looked at
constexpr size_t kMaxTextBytes = std::numeric_limits<size_t>::max();  // the body's limit is limit enough
constexpr int64_t kDefaultCompletionTokens = 16;

// Fields that would change the answer and that this server does not implement. Ignoring them would answer another
// question than the one asked. Allowed are null, false, and the values that mean "nothing of the kind".
constexpr std::array kUnsupported = {
    "suffix",
    "prompt_embeds",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "allowed_token_ids",
    "bad_words",
    "logits_processors",
    "logprob_token_ids",
    "use_beam_search",
    "echo",
    "tools",
    "functions",
    "function_call",
    "documents",
    "chat_template",
    "audio",
    "mm_processor_kwargs",
    "thinking_token_budget",
    "stop_regex",
    "prediction",
    "web_search_options",
    "do_remote_prefill",
    "do_remote_decode",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
    "routed_dp_rank",
    "priority",
};

bool means_nothing(std::string_view name, const Json& value) {
  if (value.is_boolean()) return !value.get<bool>();
  if (name == "suffix" && value.is_string()) return value.get_ref<const std::string&>().empty();
  if (name == "priority" && value.is_number_integer()) return value == 0;
  return false;
}

void refuse_unsupported(RequestFields& fields) {
  for (const char* name : kUnsupported) {
    const Json* value = fields.find(name);
    if (value == nullptr || means_nothing(name, *value)) continue;
    fields.fail(field_error(name, "unsupported_parameter", fmt::format("'{}' is not supported by this server", name)));
  }
  if (const Json* best_of = fields.find("best_of"); best_of != nullptr && *best_of != 1) {
    fields.fail(field_error("best_of", "unsupported_parameter", "'best_of' is not supported; use 'n'"));
  }
  if (const Json* format = fields.object("response_format")) {
    const auto type = format->find("type");
    if (type == format->end() || *type != "text") {
      fields.fail(field_error("response_format", "unsupported_parameter",
                              "the only supported 'response_format' is {\"type\":\"text\"}"));
    }
  }
  if (const Json* choice = fields.find("tool_choice"); choice != nullptr && *choice != "none") {
    fields.fail(field_error("tool_choice", "invalid_value", "'tool_choice' needs 'tools', which are not supported"));
  }
  if (const Json* modalities = fields.find("modalities"); modalities != nullptr && *modalities != Json({"text"})) {
    fields.fail(field_error("modalities", "unsupported_parameter", "the only supported modality is \"text\""));
  }
}

void read_model(RequestFields& fields, const ServedModel& model, bool required, OpenAiRequest& request) {
  const Json* value = fields.find("model");
  if (value == nullptr) {
    if (required) fields.fail(field_error("model", "missing_required_parameter", "you must give a 'model'"));
    request.model = model.names.front();
    return;
  }
  const std::string* name = fields.text("model", kMaxTextBytes);
  if (name == nullptr) return;
  if (name->find('\0') != std::string::npos) {
    fields.fail_value("model", "has a NUL character");
  } else if (std::find(model.names.begin(), model.names.end(), *name) == model.names.end()) {
    fields.fail({ErrorKind::kNotFound, fmt::format("the model {} does not exist; this server has {}", quote_for_message(*name), fmt::join(model.names, ", ")), "model",
                 "model_not_found"});
  } else {
    request.model = *name;
  }
}

void read_token_id_list(RequestFields& fields, std::string_view name, const ServedModel& model,
                        std::vector<TokenId>& out) {
  const Json* ids = fields.array(name, kMaxStopTokenIds);
  if (ids == nullptr) return;
  Result<std::vector<TokenId>> parsed = parse_token_ids(*ids, model, std::string(name));
  if (parsed.ok()) {
    out = std::move(*parsed);
  } else {
    fields.fail(parsed.error());
  }
}

void read_logit_bias(RequestFields& fields, const ServedModel& model, engine::SamplingParams& sampling) {
  const Json* biases = fields.object("logit_bias");
  if (biases == nullptr) return;
  if (biases->size() > kMaxLogitBiases) {
    fields.fail_value("logit_bias", fmt::format("has {} entries, the limit is {}", biases->size(), kMaxLogitBiases));
    return;
  }
  for (const auto& [key, value] : biases->items()) {
    TokenId id = -1;
    const auto [end, ec] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (ec != std::errc() || end != key.data() + key.size() || id < 0 || id >= model.vocab_size) {
      fields.fail_value("logit_bias", fmt::format("has the key {}, keys must be token ids 0 … {}",
                                                  quote_for_message(key), model.vocab_size - 1));
      return;
    }
    if (!value.is_number()) {
      fields.fail_type("logit_bias", "an object from token ids to numbers");
      return;
    }
    const double bias = value.get<double>();
    if (!(std::abs(bias) <= 100)) {
      fields.fail_value("logit_bias", fmt::format("has the value {}, must be between -100 and 100", bias));
      return;
    }
    sampling.logit_bias.emplace_back(id, static_cast<float>(bias));
  }
}

void read_stop(RequestFields& fields, OpenAiRequest& request) {
  const Json* value = fields.find("stop");
  if (value == nullptr) return;
  const auto take = [&](const Json& item) {
    const std::string* text = item.get_ptr<const std::string*>();
    if (text == nullptr) {
      fields.fail_type("stop", "a string or an array of strings");
    } else if (text->empty() || text->size() > kMaxStopStringBytes) {
      fields.fail_value("stop",
                        fmt::format("has a string of {} bytes, must be 1 … {}", text->size(), kMaxStopStringBytes));
    } else {
      request.stop.push_back(*text);
    }
  };
  if (!value->is_array()) return take(*value);
  if (value->size() > kMaxStopStrings) {
    fields.fail_value("stop", fmt::format("has {} strings, the limit is {}", value->size(), kMaxStopStrings));
    return;
  }
  for (const Json& item : *value) take(item);
}

void read_sampling(RequestFields& fields, const ServedModel& model, OpenAiRequest& request) {
  engine::SamplingParams& s = request.sampling;
  const GenerationDefaults& defaults = model.defaults;
  s.temperature = fields.number("temperature", 0, 2).value_or(defaults.temperature.value_or(1.0));
  if (s.temperature < kMinTemperature) s.temperature = 0;
  s.top_p = fields.number("top_p", 0, 1).value_or(defaults.top_p.value_or(1.0));
  if (s.top_p == 0) fields.fail_value("top_p", "is 0, must be greater than 0 and at most 1");
  s.top_k = fields.integer("top_k", -1, std::numeric_limits<int64_t>::max()).value_or(defaults.top_k.value_or(0));
  if (s.top_k < 0 || s.top_k >= model.vocab_size) s.top_k = 0;  // -1 and the whole vocabulary are: off
  s.min_p = fields.number("min_p", 0, 1).value_or(defaults.min_p.value_or(0.0));
  s.presence_penalty = fields.number("presence_penalty", -2, 2).value_or(0.0);
  s.frequency_penalty = fields.number("frequency_penalty", -2, 2).value_or(0.0);
  constexpr double kMaxPenalty = 1e6;
  s.repetition_penalty =
      fields.number("repetition_penalty", 0, kMaxPenalty).value_or(defaults.repetition_penalty.value_or(1.0));
  if (s.repetition_penalty < 1.0 / kMaxPenalty) fields.fail_value("repetition_penalty", "must be greater than 0");
  request.seed = fields.integer("seed", std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max());
  read_logit_bias(fields, model, s);
  read_token_id_list(fields, "stop_token_ids", model, s.stop_token_ids);
  read_stop(fields, request);
  s.ignore_eos = fields.boolean("ignore_eos").value_or(false);
  s.min_tokens = fields.integer("min_tokens", 0, kMaxTokenCount).value_or(0);
  request.n = fields.integer("n", 1, kMaxN).value_or(1);
  if (request.n > 1 && s.temperature == 0) {
    fields.fail_value("n", fmt::format("is {}, must be 1 for temperature 0: all choices would be equal", request.n));
  }
}

void read_output_options(RequestFields& fields, OpenAiRequest& request) {
  request.include_stop_str_in_output = fields.boolean("include_stop_str_in_output").value_or(false);
  request.skip_special_tokens = fields.boolean("skip_special_tokens").value_or(true);
  request.detokenize = fields.boolean("detokenize").value_or(true);
  request.return_token_ids = fields.boolean("return_token_ids").value_or(false);
  request.return_tokens_as_token_ids =
      fields.boolean("return_tokens_as_token_ids").value_or(false) || !request.detokenize;
  request.stream = fields.boolean("stream").value_or(false);
  if (!request.detokenize && !request.stop.empty()) {
    fields.fail_value("stop", "cannot be used with 'detokenize': false, which makes no text to search");
  }
  const Json* stream_options = fields.object("stream_options");
  if (stream_options == nullptr) return;
  if (!request.stream) {
    fields.fail_value("stream_options", "is only allowed with 'stream': true");
    return;
  }
  RequestFields options(*stream_options, "stream_options.");
  request.include_usage = options.boolean("include_usage").value_or(false);
  request.continuous_usage_stats = options.boolean("continuous_usage_stats").value_or(false);
  if (options.failed()) fields.fail(options.error());
}

void read_kv_transfer(RequestFields& fields, const RequestPolicy& policy, OpenAiRequest& request) {
  if (const std::string* salt = fields.text("cache_salt", kMaxCacheSaltBytes)) {
    if (salt->empty()) fields.fail_value("cache_salt", "is empty");
    request.cache_salt = *salt;
  }
  const Json* params = fields.object("kv_transfer_params");
  if (params == nullptr) return;
  if (!policy.accepts_kv_transfer) {
    fields.fail_value("kv_transfer_params", "is not accepted by this server");
    return;
  }
  Result<transfer::KvTransferParams> parsed = transfer::parse_kv_transfer_params(nlohmann::json(*params));
  if (!parsed.ok()) {
    fields.fail(parsed.error());
    return;
  }
  request.kv_transfer = std::move(*parsed);
  if (request.n != 1 || request.prompts.size() > 1) {
    fields.fail_value("kv_transfer_params", "needs a single prompt and 'n' = 1: a transfer has one reader");
  }
  if (request.kv_transfer->do_remote_prefill && request.kv_transfer->mode == transfer::TransferMode::kPush &&
      !request.stream) {
    fields.fail_value("kv_transfer_params", "of a push need 'stream': the address to send to is the first event");
  }
}

// A router continues an answer here whose worker went away.
void read_resumed(RequestFields& fields, const ServedModel& model, const RequestPolicy& policy,
                  OpenAiRequest& request) {
  const Json* ids = fields.find("resume_token_ids");
  if (ids == nullptr) return;
  if (!policy.accepts_resumed) return fields.fail_value("resume_token_ids", "is not accepted by this server");
  if (request.n != 1 || request.prompts.size() != 1 || request.kv_transfer) {
    return fields.fail_value("resume_token_ids", "needs a single prompt, 'n' = 1 and no 'kv_transfer_params'");
  }
  Result<std::vector<TokenId>> parsed = parse_token_ids(*ids, model, "resume_token_ids");
  if (!parsed.ok()) return fields.fail(parsed.error());
  request.resumed = std::move(*parsed);
}

// What both endpoints share. Call after the prompts were read.
void read_common(RequestFields& fields, const ServedModel& model, const RequestPolicy& policy, OpenAiRequest& request) {
  refuse_unsupported(fields);
  read_sampling(fields, model, request);
  read_output_options(fields, request);
  read_kv_transfer(fields, policy, request);
  read_resumed(fields, model, policy, request);
}

void read_prompts(RequestFields& fields, const ServedModel& model, OpenAiRequest& request) {
  const Json* prompt = fields.find("prompt");
  if (prompt == nullptr) {
    fields.fail(field_error("prompt", "missing_required_parameter", "you must give a 'prompt'"));
    return;
  }
  const auto take = [&](const Json& item) {
    if (const std::string* text = item.get_ptr<const std::string*>()) {
      if (text->empty()) fields.fail_value("prompt", "is empty");
      request.prompts.emplace_back(*text);
    } else if (item.is_array()) {
      Result<std::vector<TokenId>> ids = parse_token_ids(item, model, "prompt");
      if (!ids.ok()) {
        fields.fail(ids.error());
      } else if (ids->empty()) {
        fields.fail_value("prompt", "is empty");
      } else {
        request.prompts.emplace_back(std::move(*ids));
      }
    } else {
      fields.fail_type("prompt", "a string, an array of strings, an array of token ids, or an array of such arrays");
    }
  };
  const bool is_list = prompt->is_array() && !prompt->empty() && !prompt->front().is_number();
  if (!is_list) return take(*prompt);
  if (prompt->size() > kMaxPrompts) {
    fields.fail_value("prompt", fmt::format("has {} prompts, the limit is {}", prompt->size(), kMaxPrompts));
    return;
  }
  for (const Json& item : *prompt) {
    if (item.type() != prompt->front().type()) fields.fail_type("prompt", "of one kind: all strings or all token ids");
    take(item);
    if (fields.failed()) return;
  }
}

Result<OpenAiRequest> finish_parse(RequestFields& fields, OpenAiRequest request) {
  const int64_t choices = request.n * static_cast<int64_t>(std::max<size_t>(request.prompts.size(), 1));
  if (choices > kMaxChoices) {
    fields.fail_value("n", fmt::format("times the number of prompts is {}, the limit is {}", choices, kMaxChoices));
  }
  if (request.max_tokens && request.sampling.min_tokens > *request.max_tokens) {
    fields.fail_value("min_tokens", fmt::format("is {}, must not be greater than max_tokens, {}",
                                                request.sampling.min_tokens, *request.max_tokens));
  }
  if (fields.failed()) return fields.error();
  return request;
}

Status check_is_object(const Json& body) {
  if (body.is_object()) return {};
  return field_error("", "invalid_type", "the body must be a JSON object");
}

}  // namespace

Error context_error(const ServedModel& model, std::string param, std::string_view message) {
  return field_error(std::move(param), "context_length_exceeded",
                     fmt::format("the context of this model has {} tokens, but {}", model.max_model_len, message));
}

Result<GenerationDefaults> parse_generation_config(std::string_view text) {
  GenerationDefaults defaults;
  if (text.empty()) return defaults;
  TANDEM_ASSIGN(const Json json, parse_strict_json(text, "generation_config.json"));
  TANDEM_TRY(check_is_object(json));
  RequestFields fields(json, "generation_config.json: ");
  defaults.temperature = fields.number("temperature", 0, 2);
  defaults.top_p = fields.number("top_p", 0, 1);
  defaults.top_k = fields.integer("top_k", -1, std::numeric_limits<int64_t>::max());
  defaults.min_p = fields.number("min_p", 0, 1);
  defaults.repetition_penalty = fields.number("repetition_penalty", 1e-6, 1e6);
  if (fields.failed()) return fields.error();
  return defaults;
}

Result<std::vector<TokenId>> parse_token_ids(const Json& ids, const ServedModel& model, const std::string& param) {
  if (!ids.is_array()) return field_error(param, "invalid_type", fmt::format("'{}' must be an array of ids", param));
  std::vector<TokenId> out;
  out.reserve(ids.size());
  for (const Json& id : ids) {
    if (!id.is_number_integer()) {
      return field_error(param, "invalid_type", fmt::format("'{}' must have integers as token ids", param));
    }
    const bool fits = !id.is_number_unsigned() || id.get<uint64_t>() < static_cast<uint64_t>(model.vocab_size);
    if (!fits || id.get<int64_t>() < 0 || id.get<int64_t>() >= model.vocab_size) {
      return field_error(param, "invalid_value",
                         fmt::format("'{}' has the token id {}, which is out of vocabulary; ids are 0 … {}", param,
                                     id.dump(), model.vocab_size - 1));
    }
    out.push_back(static_cast<TokenId>(id.get<int64_t>()));
  }
  return out;
}

Status check_model_name(const Json& body, const ServedModel& model, bool required) {
  TANDEM_TRY(check_is_object(body));
  RequestFields fields(body);
  OpenAiRequest ignored;
  read_model(fields, model, required, ignored);
  if (fields.failed()) return fields.error();
  return {};
}

Result<OpenAiRequest> parse_completion_request(const Json& body, const ServedModel& model,
                                               const RequestPolicy& policy) {
  TANDEM_TRY(check_is_object(body));
  RequestFields fields(body);
  OpenAiRequest request;
  request.endpoint = Endpoint::kCompletions;
  // Tokens in, tokens out is how our own router asks; it has checked the name at its own edge.
  const bool only_tokens = !fields.boolean("detokenize").value_or(true);
  read_model(fields, model, /*required=*/!only_tokens, request);
  read_prompts(fields, model, request);
  request.add_special_tokens = fields.boolean("add_special_tokens").value_or(true);
  request.max_tokens = fields.integer("max_tokens", 1, kMaxTokenCount);
  request.sampling.num_logprobs = fields.integer("logprobs", 0, kMaxLogprobs).value_or(-1);
  read_common(fields, model, policy, request);
  return finish_parse(fields, std::move(request));
}

Result<OpenAiRequest> parse_chat_request(const Json& body, const ServedModel& model, const RequestPolicy& policy) {
  TANDEM_TRY(check_is_object(body));
  RequestFields fields(body);
  OpenAiRequest request;
  request.endpoint = Endpoint::kChat;
  read_model(fields, model, /*required=*/true, request);
  if (!fields.failed()) {
    Result<ChatPrompt> chat = parse_chat_prompt(body);
    if (chat.ok()) {
      request.chat = std::move(*chat);
    } else {
      fields.fail(chat.error());
    }
  }
  // The newer name wins if both are given.
  request.max_tokens = fields.integer("max_tokens", 1, kMaxTokenCount);
  if (const auto newer = fields.integer("max_completion_tokens", 1, kMaxTokenCount)) request.max_tokens = newer;
  const bool logprobs = fields.boolean("logprobs").value_or(false);
  const std::optional<int64_t> top_logprobs = fields.integer("top_logprobs", 0, kMaxLogprobs);
  if (top_logprobs && !logprobs) fields.fail_value("top_logprobs", "is only allowed with 'logprobs': true");
  request.sampling.num_logprobs = logprobs ? top_logprobs.value_or(0) : -1;
  read_common(fields, model, policy, request);
  return finish_parse(fields, std::move(request));
}

Result<std::vector<engine::TokenRequest>> make_token_requests(const OpenAiRequest& request,
                                                              std::vector<std::vector<TokenId>> prompts,
                                                              const ServedModel& model, const std::string& external_id,
                                                              int64_t deadline_us) {
  const std::string param = request.endpoint == Endpoint::kChat ? "messages" : "prompt";
  int64_t total_tokens = 0;
  std::vector<engine::TokenRequest> out;
  for (std::vector<TokenId>& prompt : prompts) {
    const int64_t length = static_cast<int64_t>(prompt.size());
    const int64_t room = model.max_model_len - length;
    if (length == 0) return field_error(param, "invalid_value", "the prompt has no tokens");
    if (room < 1) {
      return context_error(model, param, fmt::format("the prompt has {}, which leaves none for the answer", length));
    }
    if (request.max_tokens && *request.max_tokens > room) {
      return context_error(
          model, param,
          fmt::format("the prompt has {} and max_tokens is {}; shorten one of them", length, *request.max_tokens));
    }
    total_tokens += length * request.n;
    if (total_tokens > kMaxFanOutTokens) {
      return field_error("n", "invalid_value",
                         fmt::format("the prompts have more than {} tokens in all choices", kMaxFanOutTokens));
    }
    engine::TokenRequest base;
    base.sampling = request.sampling;
    const int64_t default_tokens =
        request.endpoint == Endpoint::kChat ? room : std::min(room, kDefaultCompletionTokens);
    base.sampling.max_tokens = request.max_tokens.value_or(default_tokens);
    if (base.sampling.min_tokens > base.sampling.max_tokens) {
      return field_error("min_tokens", "invalid_value",
                         fmt::format("'min_tokens' is {}, but at most {} tokens can be generated",
                                     base.sampling.min_tokens, base.sampling.max_tokens));
    }
    if (std::ssize(request.resumed) >= base.sampling.max_tokens) {
      return field_error("resume_token_ids", "invalid_value",
                         fmt::format("'resume_token_ids' has {} tokens of an answer of at most {}; nothing is left",
                                     request.resumed.size(), base.sampling.max_tokens));
    }
    base.resumed = request.resumed;
    base.is_one_of_several = request.n > 1;
    base.cache_salt = request.cache_salt;
    base.deadline_us = deadline_us;
    base.kv_transfer = request.kv_transfer;
    base.prompt = std::move(prompt);
    for (int64_t k = 0; k < request.n; ++k) {
      engine::TokenRequest& choice = out.emplace_back(k + 1 < request.n ? base : std::move(base));
      choice.sampling.seed =
          request.seed ? static_cast<uint64_t>(*request.seed) + static_cast<uint64_t>(k) : random_u64();
    }
  }
  for (size_t i = 0; i < out.size(); ++i) {
    out[i].external_id = out.size() == 1 ? external_id : fmt::format("{}-{}", external_id, i);
  }
  return out;
}

}  // namespace tandem::api
