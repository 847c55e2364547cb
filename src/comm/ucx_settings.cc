#include "src/comm/ucx_settings.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

namespace tandem::comm {
namespace {

using Settings = std::vector<std::pair<const char*, std::string>>;

Settings list_settings(const std::string& device, bool shared_memory) {
  Settings settings = {
      {"TLS", shared_memory ? "posix,tcp" : "tcp"},
      {"NET_DEVICES", device},
      {"KEEPALIVE_INTERVAL", "1s"},
      {"LOG_LEVEL", "fatal"},  // failures come back as status codes and are reported by us
      {"MAX_EAGER_RAILS", "1"},
      {"MAX_RNDV_RAILS", "1"},
      {"CONN_NB", "y"},         // a vanished host must not block the thread in connect()
      {"PUT_ENABLE", "n"},      // no remote writes
      {"RX_SEG_SIZE", "128k"},  // a whole payload per receive: 3 times the default's throughput on loopback
  };
  if (shared_memory) {
    const Settings more = {
        // Lets shared memory be used with error handling by peer. What it cannot handle is a sender that dies while
        // it writes into a receive queue: the queue stays stuck. Therefore each connection has its own queue.
        {"MM_ERROR_HANDLING", "y"},
        {"MM_SEG_SIZE", "65528"},   // the length of a message is a 16-bit number there
        {"MM_FIFO_SIZE", "32"},     // 32 segments, 2 MiB of /dev/shm per connection and side …
        {"MM_RX_BUFS_GROW", "40"},  // … and a few more for those being read
    };
    settings.insert(settings.end(), more.begin(), more.end());
  }
  return settings;
}

Error make_ucx_error(const char* what, ucs_status_t status) {
  return make_error(ErrorKind::kInternal, "UCX {}: {}", what, ucs_status_string(status));
}

}  // namespace

Result<ucp_context_h> make_ucx_context(const std::string& device, bool shared_memory) {
  ucp_config_t* raw_config = nullptr;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &raw_config);
  if (status != UCS_OK) return make_ucx_error("configuration", status);
  const std::unique_ptr<ucp_config_t, decltype(&ucp_config_release)> config(raw_config, &ucp_config_release);
  for (const auto& [name, value] : list_settings(device, shared_memory)) {
    status = ucp_config_modify(config.get(), name, value.c_str());
    if (status != UCS_OK) return make_ucx_error(name, status);
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.name = "tandem";
  ucp_context_h context = nullptr;
  status = ucp_init(&params, config.get(), &context);
  if (status != UCS_OK) return make_ucx_error("start", status);
  return context;
}

// UCX 1.13 tells its choice only as text: "lane[1]:  3:posix/memory.0 md[2]  -> … am am_bw#0".
std::string describe_transport(ucp_ep_h endpoint) {
  char* text = nullptr;
  size_t size = 0;
  FILE* stream = open_memstream(&text, &size);
  if (stream == nullptr) return "unknown";
  ucp_ep_print_info(endpoint, stream);
  std::fclose(stream);
  const std::string info(text, size);
  std::free(text);
  size_t begin = 0;
  while (begin < info.size()) {
    const size_t end = std::min(info.find('\n', begin), info.size());
    const std::string line = info.substr(begin, end - begin);
    begin = end + 1;
    const size_t lane = line.find("lane[");
    if (lane == std::string::npos || (line + " ").find(" am ") == std::string::npos) continue;
    const size_t index = line.find(':', line.find(':', lane) + 1);
    const size_t dot = line.find('.', index);
    if (index == std::string::npos || dot == std::string::npos) continue;
    return line.substr(index + 1, dot - index - 1);
  }
  return "unknown";
}

}  // namespace tandem::comm
