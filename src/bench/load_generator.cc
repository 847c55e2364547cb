#include "src/bench/load_generator.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <deque>
#include <nlohmann/json.hpp>

#include "src/api/api_error.h"
#include "src/api/http_client.h"

namespace tandem::bench {
namespace {

namespace asio = boost::asio;
using SteadyTime = std::chrono::steady_clock::time_point;

constexpr std::chrono::milliseconds kProgressInterval{100};

class LoadRun {
 public:
  LoadRun(const std::vector<PromptRequest>& prompts, const LoadOptions& options)
      : prompts_(prompts),
        options_(options),
        arrivals_(make_arrivals(std::ssize(prompts), options.request_rate, options.seed)),
        client_(io_, {}),
        arrival_timer_(io_),
        progress_timer_(io_),
        streams_(prompts.size()) {
    result_.records.resize(prompts.size());
  }

  LoadResult run() {
    begin_ = std::chrono::steady_clock::now();
    schedule_next();
    show_progress();
    io_.run();
    result_.duration = last_end_;
    return std::move(result_);
  }

 private:
  // What is known of a request while it runs.
  struct Stream {
    double last_token = 0;  // time of the last chunk with tokens; 0: none yet
    int64_t chunks = 0;
    bool finished = false;  // a finish reason came
    std::string error;
  };

  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

  void schedule_next() {
    if (next_ == prompts_.size()) return;
    arrival_timer_.expires_at(
        begin_ + std::chrono::duration_cast<SteadyTime::duration>(std::chrono::duration<double>(arrivals_[next_])));
    arrival_timer_.async_wait([this](const boost::system::error_code& error) {
      if (error) return;
      waiting_.push_back(next_++);
      start_waiting();
      schedule_next();
    });
  }

  void start_waiting() {
    while (!waiting_.empty() && (options_.max_concurrency == 0 || in_flight_ < options_.max_concurrency)) {
      const size_t index = waiting_.front();
      waiting_.pop_front();
      start(index);
    }
  }

  void start(size_t index) {
    ++in_flight_;
    RequestRecord& record = result_.records[index];
    record.start = seconds();
    record.input_len = prompts_[index].input_len;
    api::ClientRequest request = api::json_request(options_.chat ? "/v1/chat/completions" : "/v1/completions",
                                                   request_body(prompts_[index], options_, options_.seed + index));
    if (!options_.api_key.empty()) request.headers.emplace_back("Authorization", "Bearer " + options_.api_key);
    request.idle_timeout = request.total_timeout = options_.request_timeout;
    api::ClientHandlers handlers;
    handlers.on_event = [this, index](const api::SseEvent& event) { take_event(index, event.data); };
    handlers.on_done = [this, index](Result<api::ClientResponse> response) { end(index, std::move(response)); };
    client_.start(options_.url, std::move(request), std::move(handlers));
  }

  void take_event(size_t index, const std::string& data) {
    if (data == "[DONE]") return;
    const double now = seconds();
    RequestRecord& record = result_.records[index];
    Stream& stream = streams_[index];
    const nlohmann::json chunk = nlohmann::json::parse(data, nullptr, /*allow_exceptions=*/false);
    if (!chunk.is_object()) {
      stream.error = "an event that is not a JSON object";
      return;
    }
    if (chunk.contains("error")) {
      stream.error = api::error_from_response(500, data).message;
      return;
    }
    if (const auto usage = chunk.find("usage"); usage != chunk.end() && usage->is_object()) {
      record.output_len = usage->value("completion_tokens", record.output_len);
      record.input_len = usage->value("prompt_tokens", record.input_len);
    }
    const auto choices = chunk.find("choices");
    if (choices == chunk.end() || !choices->is_array() || choices->empty()) return;
    const nlohmann::json& choice = choices->front();
    const bool has_finish = choice.contains("finish_reason") && choice["finish_reason"].is_string();
    stream.finished = stream.finished || has_finish;
    if (!has_text(choice) && !(has_finish && stream.chunks == 0)) return;  // a role, or a bare end
    ++stream.chunks;
    if (stream.chunks == 1) {
      record.ttft = now - record.start;
    } else {
      record.itls.push_back(now - stream.last_token);
    }
    stream.last_token = now;
  }

  bool has_text(const nlohmann::json& choice) const {
    const auto is_text = [](const nlohmann::json& object, const char* key) {
      const auto found = object.find(key);
      return found != object.end() && found->is_string() && !found->get_ref<const std::string&>().empty();
    };
    if (!options_.chat) return is_text(choice, "text");
    const auto delta = choice.find("delta");
    return delta != choice.end() && delta->is_object() &&
           (is_text(*delta, "content") || is_text(*delta, "reasoning") || is_text(*delta, "reasoning_content"));
  }

  void end(size_t index, Result<api::ClientResponse> response) {
    RequestRecord& record = result_.records[index];
    Stream& stream = streams_[index];
    const double now = seconds();
    last_end_ = std::max(last_end_, now);
    record.latency = now - record.start;
    if (!response.ok()) {
      record.error = response.error().message;
    } else if (!response->is_success()) {
      record.error = fmt::format("status {}: {}", response->status,
                                 api::error_from_response(response->status, response->body).message);
    } else if (!stream.error.empty()) {
      record.error = stream.error;
    } else if (!stream.finished) {
      record.error = "the stream ended without a finish reason";
    } else {
      record.success = true;
      if (record.output_len == 0) record.output_len = stream.chunks;
    }
    --in_flight_;
    ++ended_;
    if (ended_ == std::ssize(prompts_)) {
      progress_timer_.cancel();
      if (options_.on_progress) options_.on_progress(ended_, ended_);
    }
    start_waiting();
  }

  void show_progress() {
    if (!options_.on_progress) return;
    progress_timer_.expires_after(kProgressInterval);
    progress_timer_.async_wait([this](const boost::system::error_code& error) {
      if (error || ended_ == std::ssize(prompts_)) return;
      options_.on_progress(ended_, std::ssize(prompts_));
      show_progress();
    });
  }

  const std::vector<PromptRequest>& prompts_;
  const LoadOptions& options_;
  const std::vector<double> arrivals_;
  asio::io_context io_{1};
  api::HttpClient client_;
  asio::steady_timer arrival_timer_;
  asio::steady_timer progress_timer_;
  SteadyTime begin_;
  size_t next_ = 0;             // not yet arrived
  std::deque<size_t> waiting_;  // arrived, held back by max_concurrency
  int64_t in_flight_ = 0;
  int64_t ended_ = 0;
  double last_end_ = 0;
  std::vector<Stream> streams_;
  LoadResult result_;
};

}  // namespace

std::string request_body(const PromptRequest& prompt, const LoadOptions& options, uint64_t seed) {
  nlohmann::json body = {{"model", options.model},
                         {"max_tokens", prompt.max_tokens},
                         {"temperature", options.temperature},
                         {"seed", seed & 0x7fffffffffffffffULL},
                         {"stream", true},
                         {"stream_options", {{"include_usage", true}}}};
  if (options.ignore_eos) body["ignore_eos"] = true;
  if (options.chat) {
    CHECK(std::holds_alternative<std::string>(prompt.prompt));
    body["messages"] = {{{"role", "user"}, {"content", std::get<std::string>(prompt.prompt)}}};
  } else {
    std::visit([&](const auto& value) { body["prompt"] = value; }, prompt.prompt);
  }
  return body.dump();
}

LoadResult run_load(const std::vector<PromptRequest>& prompts, const LoadOptions& options) {
  CHECK(!prompts.empty());
  return LoadRun(prompts, options).run();
}

}  // namespace tandem::bench
