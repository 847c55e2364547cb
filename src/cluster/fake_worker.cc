// For the launcher's tests: `fake_worker serve MODEL --port N …` behaves as MODEL says.
//   ok       is ready at once
//   slow     loads for 400 ms and tells how far it is
//   broken   prints a line and exits with code 3
//   deaf     is ready and ignores SIGTERM
#include <signal.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <chrono>
#include <cstdio>
#include <string>

#include "src/api/http_server.h"

int main(int argc, char** argv) {
  const std::string model = argc > 2 && std::string(argv[1]) == "serve" ? argv[2] : "ok";
  uint16_t port = 0;
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::string(argv[i]) == "--port") port = static_cast<uint16_t>(std::stoi(argv[i + 1]));
  }
  if (model == "broken") {
    std::puts("config.json: no such file; give the model's directory");
    return 3;
  }
  boost::asio::io_context io(1);
  boost::asio::signal_set signals(io, SIGTERM);
  if (model == "deaf") {
    ::signal(SIGTERM, SIG_IGN);
  } else {
    signals.async_wait([&io](const boost::system::error_code&, int) { io.stop(); });
  }
  const auto begin = std::chrono::steady_clock::now();
  auto server = tandem::api::HttpServer::listen(io, "127.0.0.1", port, {});
  if (!server.ok()) {
    std::puts(server.error().message.c_str());
    return 1;
  }
  (*server)->add_route(
      {"GET", "/health", false, [&](std::shared_ptr<tandem::api::HttpExchange> exchange) {
         const std::chrono::duration<double> age = std::chrono::steady_clock::now() - begin;
         const double progress = model == "slow" ? age.count() / 0.4 : 1;
         if (progress >= 1) return exchange->respond({200, {}, "application/json", "{}"});
         exchange->respond(
             {503, {}, "application/json", fmt::format(R"({{"status":"loading","progress":{:.3f}}})", progress)});
       }});
  (*server)->start();
  io.run();
  return 0;
}
