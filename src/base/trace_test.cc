#include "src/base/trace.h"

#include <gtest/gtest.h>

namespace tandem {
namespace {

constexpr const char* kExample = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

TEST(Traceparent, ReadsAndWrites) {
  const std::optional<TraceContext> context = parse_traceparent(kExample);
  ASSERT_TRUE(context.has_value());
  EXPECT_TRUE(context->sampled);
  EXPECT_EQ(context->traceparent(), kExample);
  EXPECT_FALSE(parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")->sampled);
  // A later version may say more behind what is known.
  EXPECT_TRUE(parse_traceparent("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what").has_value());
}

TEST(Traceparent, RefusesWhatTheStandardForbids) {
  for (const char* text : {"", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
                           "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                           "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                           "00-00000000000000000000000000000000-b7ad6b7169203331-01",
                           "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
                           "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
                           "00_0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                           "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.what"}) {
    EXPECT_FALSE(parse_traceparent(text).has_value()) << text;
  }
}

TEST(Traceparent, ChildrenKeepTheTrace) {
  const TraceContext parent = *parse_traceparent(kExample);
  const TraceContext child = child_of(parent);
  EXPECT_EQ(child.trace_id, parent.trace_id);
  EXPECT_NE(child.span_id, parent.span_id);
  EXPECT_TRUE(child.is_valid());
  const TraceContext root = child_of({});
  EXPECT_TRUE(root.is_valid());
  EXPECT_TRUE(root.sampled);
  EXPECT_NE(root.trace_id, child_of({}).trace_id);
}

}  // namespace
}  // namespace tandem
