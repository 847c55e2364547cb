// Every kind of bad request that reaches the JSON: one row each, through a real socket, with the status, the param and
// the code that the client must see, and no request at the worker.
#include "src/api/frontend_fixture.h"

namespace tandem::api {
namespace {

struct BadCase {
  std::string body;
  int status;
  const char* param;  // null: JSON null
  const char* code;
};

std::string repeat(std::string_view text, size_t count, std::string_view separator = "") {
  std::string out;
  for (size_t i = 0; i < count; ++i) (out += i == 0 ? "" : separator) += text;
  return out;
}

class BadInputTest : public FrontendTest {
 protected:
  void check(const std::string& path, const std::vector<BadCase>& cases) {
    RawSocket socket(port);
    for (const BadCase& c : cases) {
      SCOPED_TRACE(c.body.substr(0, 200));
      const RawResponse response = socket.exchange(post_text(path, c.body));
      EXPECT_EQ(response.status, c.status) << response.body;
      const Json json = parse(response.body);
      ASSERT_TRUE(json.contains("error")) << response.body;
      const Json error = json["error"];
      EXPECT_EQ(error["param"], c.param == nullptr ? Json() : Json(c.param)) << response.body;
      EXPECT_EQ(error["code"], c.code == nullptr ? Json() : Json(c.code)) << response.body;
      EXPECT_EQ(error["type"], "invalid_request_error");
      EXPECT_FALSE(error["message"].get<std::string>().empty());
      EXPECT_LT(error["message"].get<std::string>().size(), 400U);
      EXPECT_EQ(error.size(), 4U);
    }
    EXPECT_EQ(worker->num_requests(), 0U);
    EXPECT_TRUE(eventually([this] { return num_requests() == 0; }));  // once the kernel has the answer
  }
  static BadCase completion(const std::string& fields, const char* param, const char* code) {
    return {"{\"model\":\"demo\",\"prompt\":\"a\"," + fields + "}", 400, param, code};
  }
  static BadCase prompt(const std::string& value, const char* param, const char* code) {
    return {"{\"model\":\"demo\",\"prompt\":" + value + "}", 400, param, code};
  }
  static BadCase chat(const std::string& fields, const char* param, const char* code) {
    return {"{\"model\":\"demo\",\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]," + fields + "}", 400, param,
            code};
  }
  static BadCase messages(const std::string& value, const char* param, const char* code) {
    return {"{\"model\":\"demo\",\"messages\":" + value + "}", 400, param, code};
  }
};

TEST_F(BadInputTest, Json) {
  start();
  const std::vector<BadCase> cases = {
      {"", 400, nullptr, nullptr},
      {"{", 400, nullptr, nullptr},
      {"{} x", 400, nullptr, nullptr},
      {"[]", 400, nullptr, "invalid_type"},
      {"\"x\"", 400, nullptr, "invalid_type"},
      {"7", 400, nullptr, "invalid_type"},
      {"null", 400, nullptr, "invalid_type"},
      {repeat("[", 100'000), 400, nullptr, nullptr},
      {"{\"model\":\"demo\",\"model\":\"demo\",\"prompt\":\"a\"}", 400, nullptr, nullptr},
      {"{\"model\":\"demo\",\"prompt\":\"\xff\"}", 400, nullptr, nullptr},
      {"{\"model\":\"demo\",\"prompt\":\"\\ud800\"}", 400, nullptr, nullptr},
      {"{\"model\":\"demo\",\"prompt\":\"a\",\"temperature\":NaN}", 400, nullptr, nullptr},
      {"{\"model\":\"demo\",\"prompt\":\"a\",\"temperature\":1e9999}", 400, nullptr, nullptr},
      {"{\"model\":\"demo\",\"prompt\":\"a\",\"x\":[" + repeat("1", 1'000'000, ",") + "]}", 400, nullptr, nullptr},
  };
  check("/v1/completions", cases);
  check("/v1/chat/completions", cases);
  check("/tokenize", cases);
  check("/detokenize", cases);
}

TEST_F(BadInputTest, Model) {
  start();
  for (const char* path : {"/v1/completions", "/v1/chat/completions"}) {
    check(path, {
                    {"{}", 400, "model", "missing_required_parameter"},
                    {"{\"model\":null}", 400, "model", "missing_required_parameter"},
                    {"{\"model\":7}", 400, "model", "invalid_type"},
                    {"{\"model\":\"gpt\"}", 404, "model", "model_not_found"},
                    {"{\"model\":\"\"}", 404, "model", "model_not_found"},
                    {"{\"model\":\"../../etc\"}", 404, "model", "model_not_found"},
                    {"{\"model\":\"a\\nb\"}", 404, "model", "model_not_found"},
                    {"{\"model\":\"demo\\u0000\"}", 400, "model", "invalid_value"},
                    {"{\"model\":\"" + std::string(1 << 20, 'x') + "\"}", 404, "model", "model_not_found"},
                });
  }
}

TEST_F(BadInputTest, Prompts) {
  start();
  const char* context = "context_length_exceeded";
  check("/v1/completions", {
                               {"{\"model\":\"demo\"}", 400, "prompt", "missing_required_parameter"},
                               prompt("null", "prompt", "missing_required_parameter"),
                               prompt("7", "prompt", "invalid_type"),
                               prompt("{}", "prompt", "invalid_type"),
                               prompt("true", "prompt", "invalid_type"),
                               prompt("\"\"", "prompt", "invalid_value"),
                               prompt("[]", "prompt", "invalid_value"),
                               prompt("[[]]", "prompt", "invalid_value"),
                               prompt("[\"a\",\"\"]", "prompt", "invalid_value"),
                               prompt("[\"a\",1]", "prompt", "invalid_type"),
                               prompt("[1,\"a\"]", "prompt", "invalid_type"),
                               prompt("[[1],\"a\"]", "prompt", "invalid_type"),
                               prompt("[[1],2]", "prompt", "invalid_type"),
                               prompt("[null]", "prompt", "invalid_type"),
                               prompt("[[[1]]]", "prompt", "invalid_type"),
                               prompt("[4096]", "prompt", "invalid_value"),
                               prompt("[-1]", "prompt", "invalid_value"),
                               prompt("[1099511627776]", "prompt", "invalid_value"),
                               prompt("[18446744073709551615]", "prompt", "invalid_value"),
                               prompt("[1.0]", "prompt", "invalid_type"),
                               prompt("[true]", "prompt", "invalid_type"),
                               prompt("[[7],[4096]]", "prompt", "invalid_value"),
                               prompt("[" + repeat("\"a\"", 1025, ",") + "]", "prompt", "invalid_value"),
                               prompt("[" + repeat("7", 200, ",") + "]", "prompt", context),
                               prompt("[" + repeat("7", 5'000, ",") + "]", "prompt", context),
                               prompt("\"" + repeat("word ", 4'000) + "\"", "prompt", context),
                               prompt("[" + repeat("7", 199, ",") + "],\"max_tokens\":2", "prompt", context),
                               prompt("\"a\",\"max_tokens\":200", "prompt", context),
                               prompt("[" + repeat("\"a\"", 600, ",") + "],\"n\":2", "n", "invalid_value"),
                           });
}

TEST_F(BadInputTest, Sampling) {
  start();
  std::vector<BadCase> cases;
  const auto bad = [&cases](const char* param, const char* code, const std::vector<std::string>& values) {
    for (const std::string& value : values) {
      cases.push_back(completion(fmt::format("\"{}\":{}", param, value), param, code));
    }
  };
  const char* type = "invalid_type";
  const char* value = "invalid_value";
  bad("max_tokens", value, {"0", "-1", "9223372036854775807", "9223372036854775808", "18446744073709551615"});
  bad("max_tokens", type, {"\"10\"", "1.5", "10.0", "true", "[1]", "{}"});
  bad("min_tokens", value, {"-1", "17"});
  bad("temperature", value, {"-0.1", "2.1", "1e308", "-1e308"});
  bad("temperature", type, {"\"1\"", "true", "[]"});
  bad("top_p", value, {"0", "1.1", "-1"});
  bad("top_p", type, {"\"1\""});
  bad("top_k", value, {"-2", "9223372036854775808"});
  bad("top_k", type, {"1.5", "\"5\"", "false"});
  bad("min_p", value, {"1.1", "-0.1"});
  bad("presence_penalty", value, {"2.1", "-2.1"});
  bad("frequency_penalty", value, {"2.1", "-2.1"});
  bad("repetition_penalty", value, {"0", "-1", "1e30"});
  bad("n", value, {"0", "-1", "17", "129", "1000000000"});
  bad("n", type, {"\"2\"", "2.0"});
  cases.push_back(completion("\"n\":2,\"temperature\":0", "n", value));
  cases.push_back(completion("\"n\":2,\"temperature\":1e-9", "n", value));
  bad("seed", value, {"9223372036854775808", "18446744073709551615"});
  bad("seed", type, {"18446744073709551616"});
  bad("seed", type, {"\"1\"", "1.5", "true"});
  bad("stop", value,
      {"\"\"", "[\"a\",\"\"]", "[\"1\",\"2\",\"3\",\"4\",\"5\"]", "\"" + std::string(1 << 20, 'x') + "\""});
  bad("stop", type, {"7", "[7]", "{}", "[null]", "true"});
  bad("stop_token_ids", value, {"[4096]", "[-1]", "[" + repeat("7", 129, ",") + "]"});
  bad("stop_token_ids", type, {"7", "\"7\"", "[\"7\"]", "[1.5]"});
  bad("logit_bias", value,
      {"{\"4096\":1}", "{\"-1\":1}", "{\"x\":1}", "{\"1.5\":1}", "{\"\":1}", "{\"7\":101}", "{\"7\":-100.5}",
       "{\" 7\":1}"});
  bad("logit_bias", type, {"[]", "7", "{\"7\":\"1\"}", "{\"7\":null}"});
  std::string biases;
  for (int i = 0; i < 1025; ++i) biases += fmt::format("{}\"{}\":1", i == 0 ? "" : ",", i);
  bad("logit_bias", value, {"{" + biases + "}"});
  bad("ignore_eos", type, {"1", "\"true\""});
  bad("logprobs", value, {"-1", "21"});
  bad("logprobs", type, {"true", "\"1\""});
  bad("cache_salt", value, {"\"\"", "\"" + std::string(257, 's') + "\""});
  bad("cache_salt", type, {"7"});
  bad("add_special_tokens", type, {"1"});
  check("/v1/completions", cases);
}

TEST_F(BadInputTest, OutputOptions) {
  start();
  check("/v1/completions", {
                               completion("\"stream\":\"true\"", "stream", "invalid_type"),
                               completion("\"stream\":1", "stream", "invalid_type"),
                               completion("\"stream_options\":{}", "stream_options", "invalid_value"),
                               completion("\"stream\":false,\"stream_options\":{\"include_usage\":true}",
                                          "stream_options", "invalid_value"),
                               completion("\"stream\":true,\"stream_options\":7", "stream_options", "invalid_type"),
                               completion("\"stream\":true,\"stream_options\":{\"include_usage\":1}",
                                          "stream_options.include_usage", "invalid_type"),
                               completion("\"detokenize\":false,\"stop\":\"a\"", "stop", "invalid_value"),
                               completion("\"return_token_ids\":\"yes\"", "return_token_ids", "invalid_type"),
                               completion("\"skip_special_tokens\":0", "skip_special_tokens", "invalid_type"),
                           });
  check("/v1/chat/completions", {
                                    chat("\"top_logprobs\":2", "top_logprobs", "invalid_value"),
                                    chat("\"logprobs\":false,\"top_logprobs\":0", "top_logprobs", "invalid_value"),
                                    chat("\"logprobs\":true,\"top_logprobs\":21", "top_logprobs", "invalid_value"),
                                    chat("\"logprobs\":true,\"top_logprobs\":-1", "top_logprobs", "invalid_value"),
                                    chat("\"logprobs\":1", "logprobs", "invalid_type"),
                                    chat("\"max_completion_tokens\":0", "max_completion_tokens", "invalid_value"),
                                    chat("\"max_tokens\":300", "messages", "context_length_exceeded"),
                                });
}

TEST_F(BadInputTest, Unsupported) {
  start();
  const char* code = "unsupported_parameter";
  std::vector<BadCase> cases = {
      completion("\"echo\":true", "echo", code),
      completion("\"suffix\":\"x\"", "suffix", code),
      completion("\"best_of\":2", "best_of", code),
      completion("\"prompt_embeds\":\"x\"", "prompt_embeds", code),
      completion("\"prompt_logprobs\":1", "prompt_logprobs", code),
      completion("\"truncate_prompt_tokens\":0", "truncate_prompt_tokens", code),
      completion("\"allowed_token_ids\":[]", "allowed_token_ids", code),
      completion("\"bad_words\":[\"\"]", "bad_words", code),
      completion("\"guided_json\":{}", "guided_json", code),
      completion("\"structured_outputs\":{\"regex\":\"a\"}", "structured_outputs", code),
      completion("\"use_beam_search\":true", "use_beam_search", code),
      completion("\"response_format\":{\"type\":\"json_object\"}", "response_format", code),
      completion("\"response_format\":{\"type\":\"json_schema\"}", "response_format", code),
      completion("\"response_format\":{}", "response_format", code),
      completion("\"response_format\":\"text\"", "response_format", "invalid_type"),
      completion("\"priority\":3", "priority", code),
      completion("\"do_remote_prefill\":true", "do_remote_prefill", code),
      completion("\"bootstrap_host\":\"h\"", "bootstrap_host", code),
      completion("\"data_parallel_rank\":0", "data_parallel_rank", code),
      completion("\"kv_transfer_params\":7", "kv_transfer_params", "invalid_type"),
      completion("\"kv_transfer_params\":{\"do_remote_decode\":true},\"n\":2", "kv_transfer_params", "invalid_value"),
      completion("\"kv_transfer_params\":{\"do_remote_prefill\":true,\"prompt_token_ids\":[4096]}",
                 "kv_transfer_params.prompt_token_ids", "invalid_value"),
      prompt("[\"a\",\"b\"],\"kv_transfer_params\":{\"do_remote_decode\":true}", "kv_transfer_params", "invalid_value"),
  };
  check("/v1/completions", cases);
  check("/v1/chat/completions", {
                                    chat("\"tools\":[]", "tools", code),
                                    chat("\"tools\":[{\"type\":\"function\"}]", "tools", code),
                                    chat("\"tool_choice\":\"auto\"", "tool_choice", "invalid_value"),
                                    chat("\"tool_choice\":{\"type\":\"function\"}", "tool_choice", "invalid_value"),
                                    chat("\"functions\":[]", "functions", code),
                                    chat("\"chat_template\":\"{{1}}\"", "chat_template", code),
                                    chat("\"audio\":{}", "audio", code),
                                    chat("\"modalities\":[\"text\",\"audio\"]", "modalities", code),
                                    chat("\"documents\":[]", "documents", code),
                                });
}

TEST_F(BadInputTest, Messages) {
  start();
  const std::string user = "{\"role\":\"user\",\"content\":\"a\"}";
  check(
      "/v1/chat/completions",
      {
          {"{\"model\":\"demo\"}", 400, "messages", "missing_required_parameter"},
          messages("[]", "messages", "empty_array"),
          messages("{}", "messages", "invalid_type"),
          messages("\"hi\"", "messages", "invalid_type"),
          messages("[7]", "messages[0]", "invalid_type"),
          messages("[{}]", "messages[0].role", "missing_required_parameter"),
          messages("[{\"role\":7}]", "messages[0].role", "invalid_type"),
          messages("[" + user + ",{\"role\":\"wizard\",\"content\":\"a\"}]", "messages[1].role", "invalid_value"),
          messages("[{\"role\":\"function\",\"content\":\"a\"}]", "messages[0].role", "invalid_value"),
          messages("[{\"role\":\"user\"}]", "messages[0].content", "missing_required_parameter"),
          messages("[{\"role\":\"user\",\"content\":null}]", "messages[0].content", "missing_required_parameter"),
          messages("[{\"role\":\"assistant\",\"content\":null}]", "messages[0].content", "missing_required_parameter"),
          messages("[{\"role\":\"user\",\"content\":7}]", "messages[0].content", "invalid_type"),
          messages("[{\"role\":\"user\",\"content\":[7]}]", "messages[0].content[0]", "invalid_type"),
          messages("[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]", "messages[0].content[0].text",
                   "invalid_type"),
          messages("[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"image_url\","
                   "\"image_url\":{\"url\":\"http://169.254.169.254/\"}}]}]",
                   "messages[0].content[1]", "unsupported_parameter"),
          messages("[{\"role\":\"user\",\"content\":[{\"type\":\"input_audio\"}]}]", "messages[0].content[0]",
                   "unsupported_parameter"),
          messages("[{\"role\":\"user\",\"content\":[{\"type\":\"file\"}]}]", "messages[0].content[0]",
                   "unsupported_parameter"),
          messages("[{\"role\":\"user\",\"content\":\"a\",\"name\":7}]", "messages[0].name", "invalid_type"),
          messages("[" + repeat(user, 100'000, ",") + "]", "messages", "invalid_value"),
          messages("[" + user + ",{\"role\":\"tool\",\"content\":\"a\"}]", "messages[1].tool_call_id", "invalid_value"),
          messages("[" + user + ",{\"role\":\"tool\",\"tool_call_id\":\"x\",\"content\":\"a\"}]",
                   "messages[1].tool_call_id", "invalid_value"),
          messages("[{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{}]}]", "messages[0].tool_calls[0]",
                   "invalid_value"),
          messages("[{\"role\":\"assistant\",\"tool_calls\":[{\"id\":\"c\",\"function\":{\"name\":\"f\","
                   "\"arguments\":\"{\"}}]}]",
                   "messages[0].tool_calls[0].function.arguments", "invalid_value"),
          // The template of the demo model knows no tools: it raises.
          messages("[" + user +
                       ",{\"role\":\"assistant\",\"tool_calls\":[{\"id\":\"c\",\"function\":{\"name\":\"f\"}}]},"
                       "{\"role\":\"tool\",\"tool_call_id\":\"c\",\"content\":\"a\"}]",
                   "messages", nullptr),
          messages("[{\"role\":\"user\",\"content\":\"" + repeat("word ", 400) + "\"}]", "messages",
                   "context_length_exceeded"),
          chat("\"continue_final_message\":true", "continue_final_message", "invalid_value"),
          chat("\"chat_template_kwargs\":[]", "chat_template_kwargs", "invalid_type"),
          chat("\"chat_template_kwargs\":{\"chat_template\":\"x\"}", "chat_template_kwargs", "invalid_value"),
          chat("\"chat_template_kwargs\":{\"tokenize\":true}", "chat_template_kwargs", "invalid_value"),
          chat("\"chat_template_kwargs\":{\"a\":{\"b\":1}}", "chat_template_kwargs", "invalid_value"),
          chat("\"chat_template_kwargs\":{\"a\":\"" + std::string(5'000, 'x') + "\"}", "chat_template_kwargs",
               "invalid_value"),
      });
}

TEST_F(BadInputTest, TokenizeRoutes) {
  start();
  check("/tokenize", {
                         {"{}", 400, "prompt", "missing_required_parameter"},
                         {"{\"prompt\":7}", 400, "prompt", "invalid_type"},
                         {"{\"prompt\":\"a\",\"messages\":[]}", 400, "messages", "invalid_value"},
                         {"{\"messages\":[]}", 400, "messages", "empty_array"},
                         {"{\"prompt\":\"a\",\"model\":\"gpt\"}", 404, "model", "model_not_found"},
                         {"{\"prompt\":\"a\",\"add_special_tokens\":1}", 400, "add_special_tokens", "invalid_type"},
                     });
  check("/detokenize", {
                           {"{}", 400, "tokens", "missing_required_parameter"},
                           {"{\"tokens\":\"a\"}", 400, "tokens", "invalid_type"},
                           {"{\"tokens\":[-1]}", 400, "tokens", "invalid_value"},
                           {"{\"tokens\":[4096]}", 400, "tokens", "invalid_value"},
                           {"{\"tokens\":[1.5]}", 400, "tokens", "invalid_type"},
                       });
}

TEST_F(BadInputTest, PublicEdgeRefusesFieldsOfTheInside) {
  FrontendOptions options;
  worker = std::make_unique<MockWorker>();
  start_closed(std::move(options));
  loop.run([this] { frontend->open(demo_text(), *worker); });
  check("/v1/completions", {completion("\"kv_transfer_params\":{\"do_remote_prefill\":true,\"remote_host\":\"evil\"}",
                                       "kv_transfer_params", "invalid_value")});
  RawSocket socket(port);
  for (const char* header : {"x-prefiller-host-port: evil:80\r\n", "X-Data-Parallel-Rank: 1\r\n"}) {
    EXPECT_EQ(socket.exchange(post_text("/v1/completions", "{\"model\":\"demo\",\"prompt\":\"a\"}", header)).status,
              400);
  }
  EXPECT_EQ(worker->num_requests(), 0U);
}

TEST_F(BadInputTest, SteeringHeadersAreGivenOnce) {
  FrontendOptions options;
  options.num_ranks = 2;
  options.check_prefiller = [](const std::string&) { return Status(); };
  start(std::move(options));
  RawSocket socket(port);
  for (const std::string header : {"x-prefiller-host-port", "x-data-parallel-rank"}) {
    const std::string twice = header + ": 1\r\n" + header + ": 1\r\n";
    const RawResponse response =
        socket.exchange(post_text("/v1/completions", "{\"model\":\"demo\",\"prompt\":\"a\"}", twice));
    EXPECT_EQ(response.status, 400);
    EXPECT_EQ(parse(response.body)["error"]["param"], header);
    EXPECT_NE(response.body.find("2 times"), std::string::npos) << response.body;
  }
  EXPECT_EQ(worker->num_requests(), 0U);
}

TEST_F(BadInputTest, RequestIds) {
  start();
  RawSocket socket(port);
  for (const std::string& id : {std::string(129, 'x'), std::string("a b"), std::string("\xc3\xa4"), std::string()}) {
    const RawResponse response = socket.exchange(post_text("/v1/completions", "{}", "X-Request-Id: " + id + "\r\n"));
    EXPECT_EQ(response.status, 400);
    EXPECT_EQ(parse(response.body)["error"]["param"], "X-Request-Id");
  }
  // A good one comes back with an error too.
  const RawResponse response = socket.exchange(post_text("/v1/completions", "{}", "X-Request-Id: r-1\r\n"));
  EXPECT_EQ(response.headers.at("x-request-id"), "r-1");
}

}  // namespace
}  // namespace tandem::api
