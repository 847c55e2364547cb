// Several users of the fabric as one.
#pragma once

#include <utility>
#include <vector>

#include "src/group/fabric.h"

namespace tandem::group {

class FabricUsers final : public FabricUser {
 public:
  // All outlive this; they are attached in this order and detached in the opposite one.
  explicit FabricUsers(std::vector<FabricUser*> users) : users_(std::move(users)) {}
  void attach(Fabric& fabric) override {
    for (FabricUser* const user : users_) user->attach(fabric);
  }
  void detach() override {
    for (auto user = users_.rbegin(); user != users_.rend(); ++user) (*user)->detach();
  }

 private:
  const std::vector<FabricUser*> users_;
};

}  // namespace tandem::group
