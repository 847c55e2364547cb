// The production router in the simulation: a RouterCore whose legs and probes go over the virtual network.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "src/router/router_core.h"
#include "src/sim/clients.h"
#include "src/sim/legs.h"
#include "src/sim/random.h"

namespace tandem::sim {

class RoutedFront final : private router::LegPort {
 public:
  // The way of a probe, as that of a leg.
  struct Surroundings {
    EventQueue& queue;
    Random& random;
    Trace& trace;
    Checker& checker;
    Network& network;
    Workers& workers;
    Legs& legs;
    int place;  // the router's in the network
  };
  // Workers 0 … num_prefill - 1 are prefill workers, the `num_decode` after them decode workers; if they are
  // `all_alike`, each is both.
  RoutedFront(const Surroundings& around, router::CoreOptions options, int num_prefill, int num_decode, bool all_alike);

  void start(RequestSpec spec);
  bool pulls() const { return pulls_; }
  const Clients& clients() const { return clients_; }
  int64_t num_retries() const { return core_.num_retries(); }
  int64_t num_migrations() const { return core_.num_migrations(); }
  // Nothing is left of any request, all load counters are zero, and every worker is up again.
  void check_at_rest() const;

 private:
  static constexpr int64_t kProbeUs = 500'000;

  struct OpenLeg {
    LegId id;
    size_t request = 0;
    router::Role role = router::Role::kDecode;
    int node = 0;
    bool publishes = false;
    std::string fetched;  // the handle of the publication that it is to fetch; "": none
  };

  void open_leg(const router::LegOrder& order) override;
  void cancel_leg(router::LegId id) override;
  void release(router::WorkerId worker, const std::string& transfer) override;
  void on_leg_event(router::LegId id, router::WorkerId worker, engine::TokenEvent&& event);
  void on_event(ClientRequest& request, engine::TokenEvent&& event);
  void probe(router::WorkerId worker);
  void told(router::WorkerId worker, uint64_t probe, bool success);
  void settle();

  const Surroundings around_;
  const bool enforces_disagg_;
  const bool pulls_;
  Registry metrics_;
  Clients clients_;
  router::RouterCore core_;
  std::vector<int> nodes_;  // by worker id
  std::vector<std::unique_ptr<ClientRequest>> requests_;
  std::map<router::LegId, OpenLeg> legs_;
  std::vector<uint64_t> open_probes_;  // by worker id; 0: none
  uint64_t next_probe_ = 1;
  int64_t tick_at_us_ = INT64_MAX;
};

}  // namespace tandem::sim
