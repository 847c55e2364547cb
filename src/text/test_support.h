// Fixtures of src/text/testdata for the tests of this folder.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "src/text/chat_template.h"
#include "src/text/text_bundle.h"
#include "src/text/tokenizer.h"

namespace tandem::text {

using OrderedJson = nlohmann::ordered_json;

inline const std::vector<std::string> kFixtures = {"qwen_like", "deepseek_like", "gpt2_like", "llama_like",
                                                   "unigram_like"};

inline std::string read_testdata(const std::string& name) {
  std::ifstream in(TANDEM_SOURCE_DIR "/src/text/testdata/" + name, std::ios::binary);
  EXPECT_TRUE(in) << name;
  return {std::istreambuf_iterator<char>(in), {}};
}

inline TextBundle load_fixture(const std::string& name) {
  TextBundle bundle;
  bundle.tokenizer_json = read_testdata(name + ".json");
  bundle.tokenizer_config_json = read_testdata(name + ".config.json");
  bundle.config_json = "{}";
  return bundle;
}

inline Tokenizer make_tokenizer(const std::string& name) { return Tokenizer::create(load_fixture(name)).value(); }

inline const OrderedJson& read_golden(const std::string& name) {
  static const OrderedJson all = OrderedJson::parse(read_testdata("golden.json"));
  return all.at(name);
}

// Ids of which half are low, where most fixtures have their single bytes; some have no token.
inline std::vector<TokenId> random_ids(std::mt19937_64& random, const Tokenizer& tokenizer) {
  std::vector<TokenId> ids(random() % 60);
  for (TokenId& id : ids) {
    const uint64_t bound = random() % 2 == 0 ? 300 : static_cast<uint64_t>(tokenizer.vocab_size()) + 2;
    id = static_cast<TokenId>(random() % bound);
  }
  return ids;
}

}  // namespace tandem::text
