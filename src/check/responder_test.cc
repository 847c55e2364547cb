#include "src/check/responder.h"

#include <gtest/gtest.h>

#include "src/base/version.h"

namespace tandem::check {
namespace {

ProcessFacts examine(const std::vector<std::string>& arguments, int64_t num_ranks) {
  ProcessFacts facts;
  facts.config_hash = arguments.at(1);
  facts.threads = num_ranks;
  return facts;
}

std::string error_of(Responder& responder, const nlohmann::json& request) {
  const Result<nlohmann::json> answer = responder.answer(request);
  return answer.ok() ? "no error" : answer.error().message;
}

TEST(Responder, TellsWhatTheHostIs) {
  Responder responder(examine);
  const nlohmann::json hello = *responder.answer({{"op", "hello"}});
  EXPECT_EQ(hello["protocol"], kProtocol);
  EXPECT_EQ(hello["version"], kVersion);
  const nlohmann::json answer =
      *responder.answer({{"op", "facts"}, {"processes", {{{"arguments", {"serve", "m"}}, {"num_ranks", 3}}}}});
  const HostFacts host = *from_peer<HostFacts>(answer["host"], "facts");
  EXPECT_EQ(host.program_sha256.size(), 64U);
  EXPECT_GT(host.processors, 0);
  EXPECT_GT(host.available_bytes, 0);
  const auto processes = *from_peer<std::vector<ProcessFacts>>(answer["processes"], "facts");
  ASSERT_EQ(processes.size(), 1U);
  EXPECT_EQ(processes[0].config_hash, "m");
  EXPECT_EQ(processes[0].threads, 3);
}

TEST(Responder, AnswersOneCheckAtATime) {
  Responder responder(examine);
  const nlohmann::json listen = {
      {"op", "listen"}, {"session", "one"}, {"places", {{{"host", "127.0.0.1"}, {"port", 0}}}}};
  const nlohmann::json answer = *responder.answer(listen);
  const auto outcomes = *from_peer<std::vector<ListenOutcome>>(answer["outcomes"], "ports");
  ASSERT_EQ(outcomes.at(0).state, PortState::kFree);
  const auto reach = [&](const char* session) {
    const nlohmann::json asked = {{"op", "connect"},
                                  {"session", session},
                                  {"timeout_ms", 3000},
                                  {"places", {{{"host", "127.0.0.1"}, {"port", outcomes[0].port}}}}};
    return (*responder.answer(asked))["outcomes"][0]["reach"].get<std::string>();
  };
  EXPECT_EQ(reach("one"), "reached");
  EXPECT_EQ(reach("two"), "other");
  nlohmann::json other = listen;
  other["session"] = "two";
  EXPECT_EQ(error_of(responder, other), "another check is running here; try again in 30 s");
  EXPECT_EQ(error_of(responder, {{"op", "end"}, {"session", "one"}}), "no error");
  EXPECT_EQ(reach("one"), "refused");  // nothing is held open any more
  EXPECT_EQ(error_of(responder, other), "no error");
}

TEST(Responder, TransportsAreMeasuredAtThePortThatWasListenedOn) {
  Responder responder(examine);
  const nlohmann::json listen = {
      {"op", "listen"}, {"session", "s"}, {"places", {{{"host", "127.0.0.1"}, {"port", 0}}}}};
  const nlohmann::json answer = *responder.answer(listen);
  const int64_t port = answer["outcomes"][0]["port"].get<int64_t>();
  const nlohmann::json echo =
      *responder.answer({{"op", "echo"}, {"session", "s"}, {"host", "127.0.0.1"}, {"port", port}});
  EXPECT_EQ(echo["port"], port);
  const nlohmann::json reading =
      *responder.answer({{"op", "measure"}, {"own_host", "127.0.0.1"}, {"host", "127.0.0.1"}, {"port", port}});
  EXPECT_EQ(reading["transport"], "shared memory");
}

TEST(Responder, RefusesWhatIsNoRequest) {
  Responder responder(examine);
  EXPECT_EQ(error_of(responder, {{"op", "format"}}), "unknown operation 'format'");
  EXPECT_EQ(error_of(responder, {{"op", "listen"}, {"session", ""}}), "a session's name has 1 … 64 bytes");
  EXPECT_EQ(error_of(responder, {{"op", "connect"}, {"session", "s"}, {"places", {{{"host", "h"}, {"port", 65536}}}}}),
            "port 65536 is not in 0 … 65535");
  const std::vector<HostPort> many(static_cast<size_t>(kMaxPorts) + 1, HostPort{"127.0.0.1", 1});
  EXPECT_EQ(error_of(responder, {{"op", "listen"}, {"session", "s"}, {"places", many}}),
            "1025 ports are more than 1024");
  for (const nlohmann::json& odd :
       {nlohmann::json(), nlohmann::json(3), nlohmann::json::parse("[", nullptr, false), nlohmann::json{{"op", 7}},
        nlohmann::json{{"op", "facts"}}, nlohmann::json{{"op", "listen"}, {"session", "s"}, {"places", "x"}}}) {
    EXPECT_EQ(error_of(responder, odd).substr(0, 27), "not a request of a check: [");
  }
}

}  // namespace
}  // namespace tandem::check
