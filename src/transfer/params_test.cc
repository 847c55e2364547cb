#include "src/transfer/params.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace tandem::transfer {
namespace {

using Json = nlohmann::json;
using testing::HasSubstr;

KvTransferParams parse(const char* text) { return parse_kv_transfer_params(Json::parse(text)).value(); }
Error parse_error(const char* text) { return parse_kv_transfer_params(Json::parse(text)).error(); }

// What vLLM's proxies send to the prefill side.
TEST(Params, TakesTheRequestOfAProxy) {
  const KvTransferParams params = parse(R"({"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,
      "remote_block_ids":null,"remote_host":null,"remote_port":null})");
  EXPECT_TRUE(params.do_remote_decode);
  EXPECT_FALSE(params.do_remote_prefill);
  EXPECT_EQ(params.mode, TransferMode::kPull);
  EXPECT_TRUE(params.remote_host.empty());
  EXPECT_EQ(params.remote_port, 0);
  EXPECT_FALSE(parse("{}").do_remote_decode);
}

TEST(Params, SurviveTheTrip) {
  KvTransferParams params;
  params.do_remote_prefill = true;
  params.remote_engine_id = "prefill-0:0123456789abcdef";
  params.remote_request_id = "7-00112233445566778899aabbccddeeff";
  params.remote_host = "10.0.0.1";
  params.remote_port = 14579;
  params.remote_num_tokens = 33;
  params.remote_block_ids = {{4, 5, 9}};
  params.prompt_token_ids = {1, 2, 3};
  const Json json = to_json(params);
  const KvTransferParams back = parse_kv_transfer_params(Json::parse(json.dump())).value();
  EXPECT_EQ(to_json(back), json);
  EXPECT_EQ(back.remote_block_ids, params.remote_block_ids);
  EXPECT_EQ(back.prompt_token_ids, params.prompt_token_ids);
  for (const char* name :
       {"do_remote_prefill", "do_remote_decode", "remote_block_ids", "remote_engine_id", "remote_request_id",
        "remote_host", "remote_port", "tp_size", "remote_num_tokens", "remote_blocks_expiry_time", "transfer_mode"}) {
    EXPECT_TRUE(json.contains(name)) << name;
  }
  EXPECT_EQ(json["transfer_mode"], "pull");
  EXPECT_TRUE(json["remote_blocks_expiry_time"].is_null());

  KvTransferParams push;
  push.do_remote_decode = true;
  push.mode = TransferMode::kPush;
  push.remote_cached_tokens = 16;
  const KvTransferParams push_back = parse_kv_transfer_params(to_json(push)).value();
  EXPECT_EQ(push_back.mode, TransferMode::kPush);
  EXPECT_EQ(push_back.remote_cached_tokens, 16);
}

TEST(Params, BlockIdsAreFlatOrGrouped) {
  using Groups = std::vector<std::vector<int64_t>>;
  EXPECT_EQ(parse(R"({"remote_block_ids":[1,2]})").remote_block_ids, (Groups{{1, 2}}));
  EXPECT_EQ(parse(R"({"remote_block_ids":[[1,2],[3]]})").remote_block_ids, (Groups{{1, 2}, {3}}));
  EXPECT_EQ(parse(R"({"remote_block_ids":[]})").remote_block_ids, Groups{});
  EXPECT_EQ(parse(R"({"remote_block_ids":[[]]})").remote_block_ids, Groups{{}});
  EXPECT_EQ(parse_error(R"({"remote_block_ids":[[1],2]})").param, "kv_transfer_params.remote_block_ids");
  EXPECT_EQ(parse_error(R"({"remote_block_ids":[1,[2]]})").param, "kv_transfer_params.remote_block_ids");
  EXPECT_EQ(parse_error(R"({"remote_block_ids":[-1]})").param, "kv_transfer_params.remote_block_ids");
}

TEST(Params, HostsOfIpv6MayHaveBrackets) {
  EXPECT_EQ(parse(R"({"remote_host":"[::1]"})").remote_host, "::1");
  EXPECT_EQ(parse(R"({"remote_host":"[fe80::1%eth0]"})").remote_host, "fe80::1%eth0");
  for (const std::string host : {"::1", "10.0.0.1", "[name]", "[]", "[::1", "::1]"}) {
    EXPECT_EQ(parse(Json{{"remote_host", host}}.dump().c_str()).remote_host, host);
  }
}

TEST(Params, UnknownFieldsAreIgnored) {
  EXPECT_TRUE(parse(R"({"do_remote_decode":true,"remote_pcp_size":2,"metaserver":{"x":[1]}})").do_remote_decode);
}

TEST(Params, WrongTypesNameTheField) {
  struct Case {
    const char* text;
    const char* field;
  };
  for (const Case& bad :
       {Case{R"({"do_remote_decode":1})", "do_remote_decode"},
        Case{R"({"do_remote_prefill":"yes"})", "do_remote_prefill"},
        Case{R"({"transfer_mode":"shove"})", "transfer_mode"}, Case{R"({"transfer_mode":5})", "transfer_mode"},
        Case{R"({"remote_engine_id":5})", "remote_engine_id"},
        Case{R"({"remote_request_id":["a"]})", "remote_request_id"},
        Case{R"({"remote_request_id":"a b"})", "remote_request_id"},
        Case{R"({"remote_host":"a\u0000b"})", "remote_host"}, Case{R"({"remote_port":"80"})", "remote_port"},
        Case{R"({"remote_port":80.5})", "remote_port"}, Case{R"({"remote_port":65536})", "remote_port"},
        Case{R"({"remote_port":-1})", "remote_port"},
        Case{R"({"remote_num_tokens":18446744073709551615})", "remote_num_tokens"},
        Case{R"({"remote_cached_tokens":-4})", "remote_cached_tokens"}, Case{R"({"tp_size":0})", "tp_size"},
        Case{R"({"remote_blocks_expiry_time":"soon"})", "remote_blocks_expiry_time"},
        Case{R"({"prompt_token_ids":"abc"})", "prompt_token_ids"},
        Case{R"({"prompt_token_ids":[1,2147483648]})", "prompt_token_ids"},
        Case{R"({"prompt_token_ids":[true]})", "prompt_token_ids"}}) {
    const Error error = parse_error(bad.text);
    EXPECT_EQ(error.kind, ErrorKind::kInvalidArgument) << bad.text;
    EXPECT_EQ(error.param, std::string("kv_transfer_params.") + bad.field) << bad.text;
    EXPECT_THAT(error.message, HasSubstr(bad.field));
  }
  EXPECT_EQ(parse_kv_transfer_params(Json::array()).error().param, "kv_transfer_params");
  EXPECT_FALSE(parse_kv_transfer_params(Json{{"remote_host", std::string(300, 'h')}}).ok());
}

}  // namespace
}  // namespace tandem::transfer
