#include "src/router/registry.h"

#include <algorithm>

#include "src/base/check.h"

namespace tandem::router {

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

WorkerId WorkerRegistry::add(Role role, std::string url) {
  const WorkerId id(static_cast<int32_t>(workers_.size()));
  workers_.push_back({.id = id, .role = role, .url = std::move(url)});
  return id;
}

RegisteredWorker& WorkerRegistry::worker(WorkerId id) { return workers_.at(static_cast<size_t>(id.value)); }
const RegisteredWorker& WorkerRegistry::worker(WorkerId id) const { return workers_.at(static_cast<size_t>(id.value)); }

bool WorkerRegistry::has_role(Role role) const {
  return std::any_of(workers_.begin(), workers_.end(), [&](const RegisteredWorker& w) { return w.role == role; });
}

bool WorkerRegistry::has_healthy(Role role) const {
  return std::any_of(workers_.begin(), workers_.end(),
                     [&](const RegisteredWorker& w) { return w.role == role && w.tracker.health() == Health::kUp; });
}

Result<WorkerId> WorkerRegistry::pick(Role role, std::span<const WorkerId> excluded) {
  std::vector<Candidate> candidates;
  int64_t known = 0;
  for (const RegisteredWorker& worker : workers_) {
    if (worker.role != role) continue;
    ++known;
    const bool is_excluded = std::find(excluded.begin(), excluded.end(), worker.id) != excluded.end();
    if (worker.tracker.health() == Health::kUp && !is_excluded) candidates.push_back({worker.id, worker.load->tokens});
  }
  if (candidates.empty()) {
    return make_error(ErrorKind::kUnavailable, "no {} worker is available ({} known); try again later", role_name(role),
                      known);
  }
  return (role == Role::kPrefill ? prefill_policy_ : decode_policy_).pick(candidates);
}

LoadToken WorkerRegistry::acquire(WorkerId id, int64_t tokens) { return LoadToken(worker(id).load, tokens); }

}  // namespace tandem::router
