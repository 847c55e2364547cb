#include "src/router/registry.h"

#include <algorithm>

#include "src/base/check.h"

namespace tandem::router {

Error worker_unavailable(std::string message) {
  return {ErrorKind::kUnavailable, std::move(message), "", kWorkerUnavailable};
}

const char* role_name(Role role) { return role == Role::kPrefill ? "prefill" : "decode"; }

bool HealthTracker::record(bool success) {
  streak_ = success ? std::max(streak_, 0) + 1 : std::min(streak_, 0) - 1;
  const Health before = health_;
  if (success && (health_ == Health::kUnknown || streak_ >= kSuccessesToUp)) health_ = Health::kUp;
  if (!success && -streak_ >= kFailuresToDown) health_ = Health::kDown;
  return health_ != before;
}

LoadToken::LoadToken(std::shared_ptr<WorkerLoad> load, int64_t tokens) : load_(std::move(load)), tokens_(tokens) {
  load_->requests += 1;
  load_->tokens += tokens_;
}

LoadToken::LoadToken(LoadToken&& other) noexcept : load_(std::move(other.load_)), tokens_(other.tokens_) {}

LoadToken& LoadToken::operator=(LoadToken&& other) noexcept {
  if (this != &other) {
    release();
    load_ = std::move(other.load_);
    tokens_ = other.tokens_;
  }
  return *this;
}

void LoadToken::grow(int64_t tokens) {
  if (!load_) return;
  tokens_ += tokens;
  load_->tokens += tokens;
}

void LoadToken::release() {
  if (!load_) return;
  load_->requests -= 1;
  load_->tokens -= tokens_;
  CHECK_GE(load_->requests, 0);
  CHECK_GE(load_->tokens, 0);
  load_.reset();
}

WorkerRegistry::WorkerRegistry(RegistryOptions options)
    : options_(options),
      prefill_policy_(options.prefill_policy, options.seed),
      decode_policy_(options.decode_policy, options.seed + 1) {}

Result<WorkerId> WorkerRegistry::add(Role role, std::string url, int64_t weight, int32_t rank) {
  for (RegisteredWorker& worker : workers_) {
    if (worker.role != role || worker.url != url) continue;
    if (worker.membership == Membership::kServing) {
      return invalid_argument("url", "{} worker {} is given twice", role_name(role), url);
    }
    if (worker.membership == Membership::kRemoved) worker.tracker = HealthTracker();
    worker.membership = Membership::kServing;
    worker.weight = weight;
    worker.rank = rank;
    return worker.id;
  }
  if (workers_.size() >= kMaxWorkers) {
    return make_error(ErrorKind::kResourceExhausted, "{} workers are known, the most a router keeps; restart it",
                      workers_.size());
  }
  const WorkerId id(static_cast<int32_t>(workers_.size()));
  workers_.emplace_back(id, role, std::move(url), weight, options_.breaker);
  workers_.back().rank = rank;
  return id;
}

void WorkerRegistry::drain(WorkerId id) {
  worker(id).membership = Membership::kDraining;
  settle(id);
}

void WorkerRegistry::settle(WorkerId id) {
  RegisteredWorker& entry = worker(id);
  if (entry.membership != Membership::kDraining || entry.load->requests > 0) return;
  entry.membership = Membership::kRemoved;
  entry.prefixes.clear();
  std::erase_if(pairs_, [id](const auto& pair) { return pair.first.first == id || pair.first.second == id; });
}

RegisteredWorker& WorkerRegistry::worker(WorkerId id) { return workers_.at(static_cast<size_t>(id.value)); }
const RegisteredWorker& WorkerRegistry::worker(WorkerId id) const { return workers_.at(static_cast<size_t>(id.value)); }

std::optional<WorkerId> WorkerRegistry::find_prefiller(std::string_view host_port) const {
  for (const RegisteredWorker& w : workers_) {
    if (w.role != Role::kPrefill || w.membership != Membership::kServing) continue;
    const std::string_view url = w.url;
    const size_t scheme = url.find("://");
    if (url.substr(scheme == std::string_view::npos ? 0 : scheme + 3) == host_port) return w.id;
  }
  return std::nullopt;
}

bool WorkerRegistry::has_role(Role role) const {
  return std::any_of(workers_.begin(), workers_.end(), [&](const RegisteredWorker& w) {
    return w.role == role && w.membership == Membership::kServing && !w.only_named;
  });
}

bool WorkerRegistry::has_healthy(Role role) const {
  return std::any_of(workers_.begin(), workers_.end(), [&](const RegisteredWorker& w) {
    return w.role == role && w.membership == Membership::kServing && w.tracker.health() == Health::kUp && !w.only_named;
  });
}

bool WorkerRegistry::is_usable(const RegisteredWorker& worker, Role role, const PickContext& context) {
  if (context.rank >= 0 && worker.rank != context.rank) return false;
  if (role == Role::kPrefill && (context.named ? worker.id != *context.named : worker.only_named)) return false;
  return worker.role == role && worker.membership == Membership::kServing && worker.tracker.health() == Health::kUp &&
         std::find(context.excluded.begin(), context.excluded.end(), worker.id) == context.excluded.end();
}

bool WorkerRegistry::is_open(const RegisteredWorker& worker, Role role, const PickContext& context) const {
  if (!is_usable(worker, role, context) || !worker.breaker.allows(context.now_us)) return false;
  if (!context.partner) return true;
  const auto pair = pairs_.find({worker.id, *context.partner});
  return pair == pairs_.end() || pair->second.allows(context.now_us);
}

bool WorkerRegistry::has_open(Role role, const PickContext& context) const {
  return std::any_of(workers_.begin(), workers_.end(),
                     [&](const RegisteredWorker& worker) { return is_open(worker, role, context); });
}

Result<WorkerId> WorkerRegistry::pick(Role role, const PickContext& context) {
  Policy& policy = role == Role::kPrefill ? prefill_policy_ : decode_policy_;
  const bool breakers_count = has_open(role, context);
  std::vector<Candidate> candidates;
  int64_t known = 0;
  for (const RegisteredWorker& worker : workers_) {
    if (worker.role == role && worker.membership == Membership::kServing) ++known;
    if (breakers_count ? !is_open(worker, role, context) : !is_usable(worker, role, context)) continue;
    candidates.push_back({worker.id, worker.load->tokens, worker.weight, 0});
    if (policy.kind() == PolicyKind::kPrefixAware) {
      candidates.back().cached_tokens = worker.prefixes.cached_tokens(context.prompt_blocks);
    }
  }
  if (candidates.empty() && context.named && role == Role::kPrefill) {
    return worker_unavailable(fmt::format("the prefill worker {} that x-prefiller-host-port names is not available; try "
                                          "again later or name another one", worker(*context.named).url));
  }
  if (candidates.empty()) {
    return worker_unavailable(
        fmt::format("no {} worker is available ({} known); try again later", role_name(role), known));
  }
  const WorkerId picked = policy.pick(candidates, context.session);
  RegisteredWorker& chosen = worker(picked);
  chosen.breaker.begin(context.now_us);
  chosen.prefixes.add(context.prompt_blocks);
  if (context.partner) {
    if (const auto pair = pairs_.find({picked, *context.partner}); pair != pairs_.end()) {
      pair->second.begin(context.now_us);
    }
  }
  return picked;
}

LoadToken WorkerRegistry::acquire(WorkerId id, int64_t tokens) { return LoadToken(worker(id).load, tokens); }

void WorkerRegistry::record_pair(WorkerId prefill, WorkerId decode, bool success, int64_t now_us) {
  if (success) {
    pairs_.erase({prefill, decode});
    return;
  }
  pairs_.try_emplace({prefill, decode}, kPairLimits).first->second.record(false, now_us);
}

}  // namespace tandem::router
