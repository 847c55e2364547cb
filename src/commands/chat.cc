// tandem chat: questions from the terminal or a pipe, answers as they are made.
#include <unistd.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "src/api/api_error.h"
#include "src/api/http_client.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"

namespace tandem::commands {
namespace {

namespace asio = boost::asio;

struct Answer {
  std::string text;
  bool stopped = false;  // by Ctrl-C
  int64_t tokens = 0;
  double first_token_s = 0;
  double last_token_s = 0;
};

// What a terminal would take as a command must not come from a model.
void print_text(const std::string& text, bool is_terminal) {
  for (const char c : text) {
    const unsigned char byte = static_cast<unsigned char>(c);
    const bool is_control = (byte < 0x20 && c != '\n' && c != '\t') || byte == 0x7f;
    std::fputc(is_terminal && is_control ? '?' : c, stdout);
  }
  std::fflush(stdout);
}

class Chat {
 public:
  Chat(const Options& options, api::HttpUrl url, std::string model)
      : options_(options), url_(std::move(url)), model_(std::move(model)), client_(io_, {}) {
    if (!options.text("system").empty()) add_message("system", options.text("system"));
  }

  // Asks, prints the answer and remembers both.
  Status ask(const std::string& question) {
    add_message("user", question);
    const Result<Answer> answer = stream_answer();
    if (!answer.ok()) {
      messages_.erase(messages_.size() - 1);
      return answer.error();
    }
    std::fputc('\n', stdout);
    std::fflush(stdout);
    if (answer->text.empty()) {  // stopped before it began: as if never asked
      messages_.erase(messages_.size() - 1);
    } else {
      add_message("assistant", answer->text);
    }
    if (options_.flag("stats")) print_stats(*answer);
    return {};
  }

 private:
  void add_message(const char* role, const std::string& text) {
    messages_.push_back({{"role", role}, {"content", text}});
  }

  std::string request_text() const {
    nlohmann::json body = {
        {"model", model_}, {"messages", messages_}, {"stream", true}, {"stream_options", {{"include_usage", true}}}};
    if (options_.integer("max-tokens") > 0) body["max_tokens"] = options_.integer("max-tokens");
    if (options_.is_set("temperature")) body["temperature"] = options_.number("temperature");
    if (options_.is_set("seed")) body["seed"] = options_.integer("seed");
    return body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  }

  Result<Answer> stream_answer() {
    Answer answer;
    std::optional<Error> failure;
    const bool is_terminal = ::isatty(STDOUT_FILENO) == 1;
    const auto begin = std::chrono::steady_clock::now();
    asio::signal_set interrupt(io_, SIGINT);
    api::ClientRequest request = api::json_request("/v1/chat/completions", request_text());
    if (!options_.text("api-key").empty()) {
      request.headers.emplace_back("Authorization", "Bearer " + options_.text("api-key"));
    }
    request.idle_timeout = request.total_timeout =
        std::chrono::milliseconds(static_cast<int64_t>(options_.number("request-timeout-s") * 1000));
    api::ClientHandlers handlers;
    handlers.on_event = [&](const api::SseEvent& event) {
      const double now = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      take_event(event.data, now, is_terminal, answer, failure);
    };
    handlers.on_done = [&](Result<api::ClientResponse> response) {
      interrupt.cancel();
      if (!response.ok()) {
        failure = response.error();
      } else if (!response->is_success()) {
        failure = api::error_from_response(response->status, response->body);
      }
    };
    const api::CallId call = client_.start(url_, std::move(request), std::move(handlers));
    interrupt.async_wait([&](const boost::system::error_code& error, int) {
      if (error) return;
      answer.stopped = true;
      client_.cancel(call);
    });
    io_.restart();
    io_.run();
    if (failure) return std::move(*failure);
    return answer;
  }

  static void take_event(const std::string& data, double now, bool is_terminal, Answer& answer,
                         std::optional<Error>& failure) {
    const nlohmann::json chunk = nlohmann::json::parse(data, nullptr, /*allow_exceptions=*/false);
    if (!chunk.is_object()) return;  // [DONE]
    if (chunk.contains("error")) {
      failure = api::error_from_response(500, data);
      return;
    }
    if (const auto usage = chunk.find("usage"); usage != chunk.end() && usage->is_object()) {
      answer.tokens = usage->value("completion_tokens", int64_t{0});
    }
    const auto choices = chunk.find("choices");
    if (choices == chunk.end() || !choices->is_array() || choices->empty()) return;
    const nlohmann::json delta = choices->front().value("delta", nlohmann::json::object());
    const auto content = delta.find("content");
    if (content == delta.end() || !content->is_string() || content->get_ref<const std::string&>().empty()) return;
    if (answer.text.empty()) answer.first_token_s = now;
    answer.last_token_s = now;
    answer.text += content->get<std::string>();
    print_text(content->get<std::string>(), is_terminal);
  }

  static void print_stats(const Answer& answer) {
    if (answer.text.empty()) {
      std::fprintf(stderr, "[%s]\n", answer.stopped ? "stopped before the first token" : "no text");
      return;
    }
    // Over the whole answer: a short one may arrive in one piece, which has no rate of its own.
    const double rate = static_cast<double>(answer.tokens) / answer.last_token_s;
    std::fprintf(stderr, "[first token after %.0f ms, %lld tokens in %.0f ms, %.1f tokens/s%s]\n", answer.first_token_s * 1e3,
                 static_cast<long long>(answer.tokens), answer.last_token_s * 1e3, rate, answer.stopped ? ", stopped" : "");
  }

  const Options& options_;
  api::HttpUrl url_;
  std::string model_;
  nlohmann::json messages_ = nlohmann::json::array();
  asio::io_context io_{1};
  api::HttpClient client_;
};

int chat_with_pipe(Chat& chat) {
  std::string question{std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
  while (!question.empty() && (question.back() == '\n' || question.back() == '\r')) question.pop_back();
  if (question.empty()) return fail_with(invalid_argument("", "standard input has no question"));
  const Status status = chat.ask(question);
  return status.ok() ? 0 : fail_with(status.error());
}

int chat_with_terminal(Chat& chat, const std::string& model) {
  std::printf("%s; an empty line or Ctrl-D ends, Ctrl-C stops an answer\n", model.c_str());
  while (true) {
    std::fputs("> ", stdout);
    std::fflush(stdout);
    std::string question;
    if (!std::getline(std::cin, question) || question.empty()) return 0;
    if (const Status status = chat.ask(question); !status.ok()) fail_with(status.error());
  }
}

}  // namespace

int run_chat(const Options& options) {
  Result<api::HttpUrl> url = api::parse_http_url(options.text("url"));
  if (!url.ok()) return fail_with(url.error());
  Result<std::string> model = resolve_model_name(*url, options.text("api-key"), options.text("model"));
  if (!model.ok()) return fail_with(model.error());
  Chat chat(options, *url, *model);
  return ::isatty(STDIN_FILENO) == 1 ? chat_with_terminal(chat, *model) : chat_with_pipe(chat);
}

}  // namespace tandem::commands
