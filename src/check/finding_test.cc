#include "src/check/finding.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <vector>

namespace tandem::check {
namespace {

const std::vector<Finding> kFindings = {
    {State::kOk, Category::kPorts, "a", "port 1", "free", "free", ""},
    {State::kWarn, Category::kTransport, "a -> b", "KV transport", "9 µs", "", "wait"},
    {State::kError, Category::kPorts, "b", "port 2", "ta\nken\x1b[2J", "free", "stop its owner"},
};

TEST(Findings, DeviationsAreListedWithTheWorstFirst) {
  EXPECT_EQ(format_findings(kFindings, false),
            "state  where   what          value       limit  remedy\n"
            "error  b       port 2        ta ken [2J  free   stop its owner\n"
            "warn   a -> b  KV transport  9 µs        -      wait\n"
            "\n"
            "ports       1 ok, 1 error\n"
            "transport   0 ok, 1 warn\n");
}

TEST(Findings, VerboseListsAll) {
  EXPECT_NE(format_findings(kFindings, true).find("ok     a       port 1        free        free   -\n"),
            std::string::npos);
  EXPECT_EQ(format_findings(std::vector<Finding>{kFindings[0]}, false), "ports       1 ok\n");
}

TEST(Findings, OnlyErrorsFail) {
  EXPECT_TRUE(has_errors(kFindings));
  EXPECT_FALSE(has_errors(std::span(kFindings).first(2)));
}

TEST(Findings, JsonHasEveryFinding) {
  const nlohmann::json json = findings_as_json(kFindings);
  EXPECT_EQ(json["ok"], false);
  ASSERT_EQ(json["findings"].size(), 3U);
  EXPECT_EQ(json["findings"][1], (nlohmann::json{{"state", "warn"},
                                                 {"category", "transport"},
                                                 {"where", "a -> b"},
                                                 {"what", "KV transport"},
                                                 {"value", "9 µs"},
                                                 {"limit", ""},
                                                 {"remedy", "wait"}}));
}

}  // namespace
}  // namespace tandem::check
