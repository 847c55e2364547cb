#include "src/base/options.h"

#include <gtest/gtest.h>
#include <unistd.h>
#include <yaml-cpp/yaml.h>

#include <cmath>
#include <fstream>

#include "src/base/kv_transfer_config.h"
#include "src/base/options_yaml.h"

namespace tandem {
namespace {

std::string write_file(const std::string& name, const std::string& text) {
  const std::string path = fmt::format("{}/{}-{}", testing::TempDir(), getpid(), name);
  std::ofstream(path) << text;
  return path;
}

std::string error_of(const std::vector<std::string>& arguments) {
  const Result<CommandLine> line = parse_command_line(arguments);
  return line.ok() ? "no error" : line.error().message;
}

Options options_of(const std::vector<std::string>& arguments) {
  Result<CommandLine> line = parse_command_line(arguments);
  if (!line.ok()) ADD_FAILURE() << line.error().message;
  return std::move(line).value().options;
}

TEST(OptionTable, EveryRowIsConsistent) {
  for (const SubcommandInfo& info : subcommand_table()) Options{info.command};  // defaults parse, names are unique
  for (const OptionSpec& spec : option_table()) {
    SCOPED_TRACE(spec.name);
    EXPECT_NE(spec.commands, 0u);
    EXPECT_EQ(std::string_view(spec.help).back(), '.');
    EXPECT_EQ(std::string_view(spec.name).find('_'), std::string_view::npos);
    EXPECT_EQ(spec.type == OptionType::kChoice, *spec.choices != '\0');
    const bool numeric =
        spec.type == OptionType::kInteger || spec.type == OptionType::kNumber || spec.type == OptionType::kBytes;
    EXPECT_EQ(numeric, spec.max > spec.min);
  }
}

TEST(CommandLine, ReadsTypedValues) {
  const Options options =
      options_of({"serve", "models/demo", "--port=8001", "--max_num_seqs", "8", "--no-enable-prefix-caching",
                  "--served-model-name", "a", "b", "--kv-cache-memory-bytes", "512M", "--request-timeout-s", "2.5"});
  EXPECT_EQ(options.text("model"), "models/demo");
  EXPECT_EQ(options.integer("port"), 8001);
  EXPECT_EQ(options.integer("max-num-seqs"), 8);
  EXPECT_FALSE(options.flag("enable-prefix-caching"));
  EXPECT_EQ(options.list("served-model-name"), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(options.integer("kv-cache-memory-bytes"), int64_t{512} << 20);
  EXPECT_EQ(options.number("request-timeout-s"), 2.5);
  EXPECT_EQ(options.text("host"), "127.0.0.1");
  EXPECT_FALSE(options.is_set("host"));
  EXPECT_FALSE(options.is_changed("host"));
  EXPECT_TRUE(options.is_changed("port"));
  EXPECT_FALSE(options_of({"serve", "m", "--port", "8000"}).is_changed("port"));  // set, but to the default
  EXPECT_EQ(options.as_text("port"), "8001");
  EXPECT_EQ(options.as_text("host"), "127.0.0.1");
  EXPECT_EQ(options.as_text("enable-prefix-caching"), "false");
  EXPECT_EQ(options_of({"serve", "m", "--api-key", "k"}).as_text("api-key"), "***");
  EXPECT_TRUE(std::isinf(options_of({"bench", "serve", "--request-rate", "inf"}).number("request-rate")));
}

TEST(Options, HandOnWhatIsSet) {
  const Result<CommandLine> line =
      parse_command_line({"serve", "folder", "--port", "8001", "--threads", "2", "--no-enable-prefix-caching", "--headless"});
  ASSERT_TRUE(line.ok());
  const std::vector<std::string_view> own = {"port"};
  EXPECT_EQ(line->options.set_arguments("Ranks", own),
            (std::vector<std::string>{"folder", "--no-enable-prefix-caching", "--threads", "2"}));
}

TEST(CommandLine, NamesTheFaultAndTheRemedy) {
  EXPECT_EQ(error_of({"serve", "m", "--prot", "1"}), "tandem serve: unknown option 'prot'; did you mean 'port'?");
  EXPECT_EQ(error_of({"serve", "m", "--port", "65536"}),
            "--port is '65536'; it must be an integer from 0 to 65535");
  EXPECT_EQ(error_of({"serve", "m", "--port", "8x"}), "--port is '8x'; it must be an integer from 0 to 65535");
  EXPECT_EQ(error_of({"serve", "m", "--dtype", "fp64"}), "--dtype is 'fp64'; it must be one of auto|bfloat16|float32");
  EXPECT_EQ(error_of({"serve"}), "'model' is missing; give it as the first argument");
  EXPECT_EQ(error_of({"quantize", "m"}), "'target' is missing; give it as the second argument");
  EXPECT_EQ(error_of({"serve", "m", "--kv-transfer-config", "[1]"}),
            R"(--kv-transfer-config is '[1]'; it must be a JSON object such as '{"kv_role":"kv_both"}')");
  EXPECT_NE(error_of({"serve", "m", "--port"}), "no error");
  EXPECT_NE(error_of({"serve", "m", "--port", "1", "--port", "2"}), "no error");
  EXPECT_EQ(error_of({"serv", "m"}), "unknown subcommand 'serv'; did you mean 'serve'?");
  EXPECT_NE(error_of({"bench"}), "no error");
  EXPECT_NE(error_of({}), "no error");
  EXPECT_NE(error_of({"serve", "m", "extra"}), "no error");
}

TEST(DottedOptions, AreFieldsOfTheObject) {
  const auto object_of = [](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "eplb");
    return options_of(arguments).text("eplb-config");
  };
  EXPECT_EQ(object_of({"--eplb-config.window_size", "1000", "--eplb-config.policy", "flash",
                       "--eplb-config.log_balancedness=true", "--eplb_config.use-async", "false"}),
            R"({"log_balancedness":true,"policy":"flash","use_async":false,"window_size":1000})");
  EXPECT_EQ(object_of({"--eplb-config.step_interval", "3", "--eplb-config", R"({"window_size":5})"}),
            R"({"step_interval":3,"window_size":5})");
  EXPECT_EQ(object_of({"--eplb-config", R"({"window_size":5})"}), R"({"window_size":5})");
  EXPECT_EQ(options_of({"serve", "m", "--kv-transfer-config.kv_role", "kv_both", "--port", "81"}).text("kv-transfer-config"),
            R"({"kv_role":"kv_both"})");
}

TEST(DottedOptions, NameTheFault) {
  EXPECT_EQ(error_of({"eplb", "--eplb-config.window_size", "1", "--eplb-config", R"({"window_size":5})"}),
            "--eplb-config: 'window_size' is given twice; leave one out");
  EXPECT_EQ(error_of({"eplb", "--eplb-config.a", "1", "--eplb-config.a=2"}),
            "--eplb-config: 'a' is given twice; leave one out");
  EXPECT_EQ(error_of({"eplb", "--eplb-config.a"}), "--eplb-config.a has no value; give one behind it");
  EXPECT_EQ(error_of({"eplb", "--eplb-config.a", "1", "--eplb-config", "[1]"}),
            "--eplb-config is '[1]'; it must be a JSON object");
  EXPECT_EQ(error_of({"eplb", "--eplb-config.a.b", "1"}), "--eplb-config.a.b: give one field, as in --eplb-config.field value");
  EXPECT_EQ(error_of({"eplb", "--eplb-confg.a", "1"}).substr(0, 42), "tandem eplb: unknown option 'eplb-confg.a'");
  EXPECT_NE(error_of({"serve", "m", "--port.a", "1"}), "no error");
}

TEST(CommandLine, PrintsHelp) {
  const Result<CommandLine> help = parse_command_line({"serve", "--help"});
  ASSERT_TRUE(help.ok());
  EXPECT_NE(help->text_to_print.find("--max-num-batched-tokens"), std::string::npos);
  EXPECT_EQ(help->text_to_print.find("--dataset-name"), std::string::npos);
  EXPECT_NE(parse_command_line({"bench", "serve", "--help"})->text_to_print.find("--dataset-name"), std::string::npos);
  EXPECT_NE(parse_command_line({"--help"})->text_to_print.find("route"), std::string::npos);
  EXPECT_EQ(parse_command_line({"--version"})->text_to_print, "tandem 0.1.0\n");
}

TEST(ConfigFile, GivesWayToTheCommandLine) {
  const std::string path =
      write_file("ok.yaml",
                 "model: models/demo\nport: 9000\nmax_num_seqs: 4\nserved-model-name: [x, y]\n"
                 "kv-transfer-config: {kv_connector: UcxConnector, kv_role: kv_both, kv_port: 5}\n");
  const Options options = options_of({"serve", "--config", path, "--port", "9001"});
  EXPECT_EQ(options.text("model"), "models/demo");
  EXPECT_EQ(options.integer("port"), 9001);
  EXPECT_EQ(options.integer("max-num-seqs"), 4);
  EXPECT_EQ(options.list("served-model-name"), (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ(parse_kv_transfer_config(options.text("kv-transfer-config"))->port, 5);
}

TEST(ConfigFile, NamesFileAndLine) {
  const auto error_in = [](const std::string& text) {
    const std::string path = write_file("bad.yaml", text);
    std::string message = error_of({"serve", "m", "--config", path});
    if (const size_t at = message.find(path); at == 0) message.replace(0, path.size(), "F");
    return message;
  };
  EXPECT_EQ(error_in("port: 1\nprt: 2\n"), "F:2: unknown option 'prt'; did you mean 'port'?");
  EXPECT_EQ(error_in("\nport: ninety\n"), "F:2: --port is 'ninety'; it must be an integer from 0 to 65535");
  EXPECT_EQ(error_in("port: [1, 2]\n"), "F:1: 'port' must be one value");
  EXPECT_EQ(error_in("port: 1\nport: 2\n"), "F:2: 'port' is given twice");
  EXPECT_EQ(error_in("- 1\n"), "F: must be a map of names to values");
  EXPECT_EQ(error_in("a: [1\n").substr(0, 4), "F:2:");
  EXPECT_EQ(error_in("config: other.yaml\n"), "F:1: 'config' cannot be set in a file");
  EXPECT_EQ(error_of({"serve", "m", "--config", "/nonexistent.yaml"}),
            "/nonexistent.yaml: cannot be read; give the path of a YAML file");
}

TEST(Echo, ShowsChangesAndHidesSecrets) {
  const Options options = options_of({"serve", "m", "--api-key", "k1", "--port", "8000", "--max-num-seqs", "3",
                                      "--kv-transfer-config", R"({"kv_role":"kv_both"})"});
  EXPECT_EQ(options.changed_json(),
            R"({"api-key":"***","kv-transfer-config":{"kv_role":"kv_both"},"max-num-seqs":3,"model":"m"})");
}

TEST(Arguments, ComeBackUnchanged) {
  const Options given = options_of({"serve", "m", "--no-enable-prefix-caching", "--api-key", "a", "b", "--port", "81",
                                    "--request-timeout-s", "0.25", "--log-name", "x y"});
  std::vector<std::string> again = {"serve", "m"};
  for (const char* name : {"enable-prefix-caching", "api-key", "port", "request-timeout-s", "log-name"}) {
    const OptionSpec& spec = **find_option(Subcommand::kServe, name);
    const OptionValue value = spec.type == OptionType::kFlag      ? OptionValue(given.flag(name))
                              : spec.type == OptionType::kList    ? OptionValue(given.list(name))
                              : spec.type == OptionType::kInteger ? OptionValue(given.integer(name))
                              : spec.type == OptionType::kNumber  ? OptionValue(given.number(name))
                                                                  : OptionValue(given.text(name));
    for (const std::string& word : option_to_arguments(spec, value)) again.push_back(word);
  }
  EXPECT_EQ(options_of(again).changed_json(), given.changed_json());
}

TEST(Options, UnknownNameIsABug) {
  EXPECT_DEATH((void)Options(Subcommand::kServe).text("prefill"), "no option 'prefill'");
}

TEST(Markdown, ListsEveryOption) {
  const std::string text = options_as_markdown();
  for (const OptionSpec& spec : option_table()) EXPECT_NE(text.find(spec.name), std::string::npos) << spec.name;
}

TEST(KvTransferConfig, TakesVllmsFields) {
  const Result<KvTransferConfig> config =
      parse_kv_transfer_config(R"({"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_port":"x"})");
  EXPECT_EQ(config.error().message, "--kv-transfer-config: kv_port is \"x\"; it must be an integer from 0 to 65535");
  const Result<KvTransferConfig> nixl =
      parse_kv_transfer_config(R"({"kv_connector":"NixlConnector","kv_role":"kv_producer"})");
  ASSERT_TRUE(nixl.ok());
  EXPECT_EQ(nixl->role, KvRole::kProducer);
  EXPECT_EQ(nixl->port, 14579);
  EXPECT_FALSE(nixl->connector_note.empty());
  EXPECT_TRUE(
      parse_kv_transfer_config(R"({"kv_connector":"UcxConnector","kv_role":"kv_both"})")->connector_note.empty());
}

TEST(KvTransferConfig, TakesTheDecodeBenchmark) {
  const auto parse = [](const std::string& extra) {
    return parse_kv_transfer_config(R"({"kv_connector":"DecodeBenchConnector","kv_role":"kv_both",)"
                                    R"("kv_connector_extra_config":)" +
                                    extra + "}");
  };
  EXPECT_EQ(parse("{}")->synthetic_fill, 0.015F);
  EXPECT_EQ(parse(R"({"fill_mean":0.5,"fill_std":0.0})")->synthetic_fill, 0.5F);
  EXPECT_EQ(parse(R"({"fill_std":0.1})").error().message,
            "--kv-transfer-config: kv_connector_extra_config.fill_std is 0.1; it must be 0: every position is filled "
            "alike");
  EXPECT_EQ(parse(R"({"fill":1})").error().param, "kv-transfer-config.kv_connector_extra_config.fill");
}

TEST(KvTransferConfig, RefusesByName) {
  const auto error_in = [](const std::string& text) { return parse_kv_transfer_config(text).error().message; };
  EXPECT_EQ(error_in(R"({"kv_conector":"UcxConnector"})"),
            "--kv-transfer-config: unknown field 'kv_conector'; did you mean 'kv_connector'?");
  EXPECT_EQ(error_in(R"({"kv_role":"kv_both"})").substr(0, 44), "--kv-transfer-config: kv_connector is null; ");
  EXPECT_EQ(error_in(R"({"kv_connector":"UcxConnector","kv_role":"both"})"),
            "--kv-transfer-config: kv_role is \"both\"; it must be kv_producer, kv_consumer or kv_both");
  EXPECT_EQ(error_in(R"({"kv_connector":"UcxConnector","kv_role":"kv_both","kv_buffer_device":"cuda"})"),
            "--kv-transfer-config: kv_buffer_device is \"cuda\"; it must be cpu, the only device of this build");
}

}  // namespace
}  // namespace tandem
