#include "src/router/completion_wire.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "src/api/api_error.h"
#include "src/api/json_text.h"

namespace tandem::router {
namespace {

using nlohmann::json;

constexpr std::string_view kTokenIdPrefix = "token_id:";  // return_tokens_as_token_ids

void append_ids(std::string& out, const std::vector<TokenId>& ids) {
  out += '[';
  char digits[16];
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += ',';
    const std::to_chars_result end = std::to_chars(digits, digits + sizeof digits, ids[i]);
    out.append(digits, end.ptr);
  }
  out += ']';
}

// {"prompt":[1,2,3] — by hand, like all of the body: a prompt has up to 10^5 ids, and a DOM costs more than the rest.
std::string open_body(const engine::TokenRequest& request) {
  std::string body = "{\"prompt\":";
  body.reserve(request.prompt.size() * 7 + 768);
  append_ids(body, request.prompt);
  return body;
}

void append(std::string& body, std::string_view name, int64_t value) {
  body += name;
  api::append_json_number(body, value);
}

void append(std::string& body, std::string_view name, double value) {
  body += name;
  api::append_json_number(body, value);
}

void append(std::string& body, std::string_view name, bool value) {
  body += name;
  body += value ? "true" : "false";
}

void append_sampling(std::string& body, const engine::SamplingParams& sampling) {
  append(body, ",\"n\":1,\"temperature\":", sampling.temperature);
  append(body, ",\"top_k\":", sampling.top_k);
  append(body, ",\"top_p\":", sampling.top_p);
  append(body, ",\"min_p\":", sampling.min_p);
  append(body, ",\"repetition_penalty\":", sampling.repetition_penalty);
  append(body, ",\"presence_penalty\":", sampling.presence_penalty);
  append(body, ",\"frequency_penalty\":", sampling.frequency_penalty);
  // The API's seed is a signed 64-bit number; bits are kept.
  append(body, ",\"seed\":", static_cast<int64_t>(sampling.seed));
  append(body, ",\"ignore_eos\":", sampling.ignore_eos);
  body += ",\"return_tokens_as_token_ids\":true,\"detokenize\":false";
  if (!sampling.stop_token_ids.empty()) {
    body += ",\"stop_token_ids\":";
    append_ids(body, sampling.stop_token_ids);
  }
  if (sampling.num_logprobs >= 0) append(body, ",\"logprobs\":", sampling.num_logprobs);
  std::string_view separator = ",\"logit_bias\":{\"";
  for (const auto& [token, bias] : sampling.logit_bias) {
    append(body, separator, static_cast<int64_t>(token));
    append(body, "\":", static_cast<double>(bias));
    separator = ",\"";
  }
  if (!sampling.logit_bias.empty()) body += '}';
}

std::string close_body(std::string body, const engine::TokenRequest& request, std::string_view transfer) {
  if (!request.cache_salt.empty()) {
    body += ",\"cache_salt\":";
    api::append_json_string(body, request.cache_salt);
  }
  if (!transfer.empty()) {
    body += ",\"kv_transfer_params\":";
    body += transfer;
  }
  return body + "}";
}

std::string text_of(const json& object, const char* field) {
  const auto found = object.find(field);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

int64_t integer_of(const json& object, const char* field, int64_t fallback) {
  const auto found = object.find(field);
  return found != object.end() && found->is_number_integer() ? found->get<int64_t>() : fallback;
}

// Inside a stream there is no status; the object's code (a number at vLLM's) or type tells it.
int status_of_error(const json& object) {
  const std::string code = text_of(object, "code");
  const std::string type = text_of(object, "type");
  if (const int64_t number = integer_of(object, "code", 0); number != 0) return static_cast<int>(number);
  if (code == "upstream_timeout") return 504;
  if (type == "rate_limit_error") return 429;
  if (type == "service_unavailable_error") return 503;
  if (type == "invalid_request_error") return 400;
  return 500;
}

Error error_in_stream(const json& chunk) {
  return api::error_from_response(status_of_error(chunk["error"]), chunk.dump());
}

Error bad_answer(std::string_view what) {
  return make_error(ErrorKind::kDataLoss, "a worker sent an answer that cannot be read: {}", what);
}

std::optional<TokenId> token_of_name(std::string_view name) {
  if (name.substr(0, kTokenIdPrefix.size()) != kTokenIdPrefix) return std::nullopt;
  name.remove_prefix(kTokenIdPrefix.size());
  TokenId token = 0;
  const std::from_chars_result parsed = std::from_chars(name.data(), name.data() + name.size(), token);
  if (parsed.ec != std::errc() || parsed.ptr != name.data() + name.size()) return std::nullopt;
  return token;
}

// Best first. The object may hold the chosen token besides the k best; it has lost the order.
Status read_top_logprobs(const json& object, int64_t num_logprobs, engine::GeneratedToken& out) {
  if (!object.is_object()) return {};
  for (const auto& [name, value] : object.items()) {
    const std::optional<TokenId> token = token_of_name(name);
    if (!token || !value.is_number()) return bad_answer("top_logprobs");
    out.top_logprobs.emplace_back(*token, value.get<float>());
  }
  std::sort(out.top_logprobs.begin(), out.top_logprobs.end(), [](const auto& a, const auto& b) {
    return a.second != b.second ? a.second > b.second : a.first < b.first;
  });
  if (out.top_logprobs.size() > static_cast<size_t>(num_logprobs)) {
    out.top_logprobs.resize(static_cast<size_t>(num_logprobs));
  }
  return {};
}

Status read_tokens(const json& choice, int64_t num_logprobs, std::vector<engine::GeneratedToken>& out) {
  const auto ids = choice.find("token_ids");
  if (ids == choice.end() || ids->is_null()) return {};
  if (!ids->is_array()) return bad_answer("token_ids");
  for (const json& id : *ids) {
    if (!id.is_number_integer()) return bad_answer("token_ids");
    out.push_back({.token = id.get<TokenId>(), .logprob = 0, .top_logprobs = {}});
  }
  if (num_logprobs < 0 || out.empty()) return {};
  const auto logprobs = choice.find("logprobs");
  if (logprobs == choice.end() || !logprobs->is_object()) return bad_answer("logprobs are missing");
  const json chosen = logprobs->value("token_logprobs", json::array());
  const json top = logprobs->value("top_logprobs", json::array());
  if (!chosen.is_array() || chosen.size() != out.size()) return bad_answer("token_logprobs");
  for (size_t i = 0; i < out.size(); ++i) {
    if (!chosen[i].is_number()) return bad_answer("token_logprobs");
    out[i].logprob = chosen[i].get<float>();
    if (num_logprobs > 0 && top.is_array() && i < top.size()) {
      TANDEM_TRY(read_top_logprobs(top[i], num_logprobs, out[i]));
    }
  }
  return {};
}

std::string transfer_of(const json& chunk) {
  const auto found = chunk.find("kv_transfer_params");
  return found != chunk.end() && found->is_object() ? found->dump() : "";
}

std::optional<int64_t> find_integer(const json& object, const char* field) {
  const auto found = object.find(field);
  if (found == object.end() || !found->is_number_integer()) return std::nullopt;
  return found->get<int64_t>();
}

Result<ChunkFields> fields_of(const json& chunk, int64_t num_logprobs) {
  ChunkFields out;
  if (const auto usage = chunk.find("usage"); usage != chunk.end() && usage->is_object()) {
    out.has_usage = true;
    out.prompt_tokens = find_integer(*usage, "prompt_tokens");
    if (const auto details = usage->find("prompt_tokens_details"); details != usage->end() && details->is_object()) {
      out.cached_tokens = find_integer(*details, "cached_tokens");
    }
  }
  const auto choices = chunk.find("choices");
  if (choices == chunk.end() || !choices->is_array() || choices->empty() || !choices->front().is_object()) return out;
  const json& choice = choices->front();
  out.has_choice = true;
  TANDEM_TRY(read_tokens(choice, num_logprobs, out.tokens));
  out.finish = finish_of_name(text_of(choice, "finish_reason"));
  out.stop_reason = find_integer(choice, "stop_reason");
  return out;
}

}  // namespace

std::string decode_body(const engine::TokenRequest& request, std::string_view transfer) {
  std::string body = open_body(request);
  if (!request.resumed.empty()) {
    body += ",\"resume_token_ids\":";
    append_ids(body, request.resumed);
  }
  append_sampling(body, request.sampling);
  append(body, ",\"max_tokens\":", request.sampling.max_tokens);
  append(body, ",\"min_tokens\":", request.sampling.min_tokens);
  body += R"(,"return_token_ids":true,"stream":true)"
          R"(,"stream_options":{"include_usage":true,"continuous_usage_stats":true})";
  return close_body(std::move(body), request, transfer);
}

std::string prefill_body(const engine::TokenRequest& request, std::string_view transfer) {
  std::string body = open_body(request);
  append_sampling(body, request.sampling);
  append(body, ",\"max_tokens\":1,\"min_tokens\":", std::min<int64_t>(request.sampling.min_tokens, 1));
  body += ",\"stream\":false";
  return close_body(std::move(body), request, transfer);
}

std::string release_body(std::string_view transfer) {
  const json given = json::parse(transfer, nullptr, /*allow_exceptions=*/false);
  json named = json::object();
  for (const char* field : {"remote_engine_id", "remote_request_id"}) {
    if (given.is_object() && given.contains(field)) named[field] = given[field];
  }
  const json body = {{"kv_transfer_params", std::move(named)}};
  return body.dump(-1, ' ', false, json::error_handler_t::replace);
}

Error error_of_response(int status, std::string_view body) {
  if (status == 401 || status == 403) {
    return make_error(ErrorKind::kInternal, "a worker refused the router's key (status {}); set --worker-api-key",
                      status);
  }
  return api::error_from_response(status, body);
}

Result<std::string> read_prefill_response(std::string_view body) {
  const json parsed = json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (!parsed.is_object()) return bad_answer("not a JSON object");
  if (parsed.contains("error") && parsed["error"].is_object()) return error_in_stream(parsed);
  return transfer_of(parsed);
}

CompletionReader::Update CompletionReader::read(std::string_view data) {
  if (data != "[DONE]") return read_chunk(data);
  Update update;
  update.event = std::move(waiting_finish_);
  waiting_finish_.reset();
  return update;
}

CompletionReader::Update CompletionReader::read_chunk(std::string_view data) {
  Update update;
  if (num_logprobs_ < 0) {
    if (std::optional<ChunkFields> fields = scan_chunk(data)) {
      update.event = take(std::move(*fields));
      return update;
    }
  }
  const json chunk = json::parse(data, nullptr, /*allow_exceptions=*/false);
  if (!chunk.is_object()) {
    update.error = bad_answer("an event that is not a JSON object");
    return update;
  }
  if (const auto error = chunk.find("error"); error != chunk.end() && error->is_object()) {
    update.error = error_in_stream(chunk);
    return update;
  }
  update.transfer = transfer_of(chunk);
  Result<ChunkFields> fields = fields_of(chunk, num_logprobs_);
  if (fields.ok()) {
    update.event = take(std::move(*fields));
  } else {
    update.error = fields.error();
  }
  return update;
}

std::optional<engine::TokenEvent> CompletionReader::take(ChunkFields fields) {
  if (fields.has_usage) {
    usage_.prompt_tokens = fields.prompt_tokens.value_or(prompt_tokens_);
    usage_.cached_tokens = fields.cached_tokens.value_or(usage_.cached_tokens);
  }
  if (usage_.prompt_tokens == 0) usage_.prompt_tokens = prompt_tokens_;
  if (fields.has_usage && waiting_finish_) {
    std::optional<engine::TokenEvent> event = std::move(waiting_finish_);
    waiting_finish_.reset();
    event->usage = usage_;
    return event;
  }
  if (!fields.has_choice) return std::nullopt;
  engine::TokenEvent event;
  event.usage = usage_;
  event.tokens = std::move(fields.tokens);
  if (!event.tokens.empty()) last_token_ = event.tokens.back().token;
  event.finish = fields.finish;
  if (event.finish == engine::FinishReason::kStop) {
    // Workers get no stop strings, so a token ended it: the one named, or the model's own end, which is the last.
    const int64_t named = fields.stop_reason.value_or(last_token_);
    if (named >= 0) event.stop_token = static_cast<TokenId>(named);
  }
  if (event.tokens.empty() && !event.finish) return std::nullopt;
  if (event.finish && !fields.has_usage) {
    waiting_finish_ = std::move(event);
    return std::nullopt;
  }
  return event;
}

}  // namespace tandem::router
