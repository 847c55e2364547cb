#include "src/base/metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "src/base/check.h"

namespace tandem {
namespace {

bool is_name(std::string_view name, bool colons) {
  if (name.empty() || (name[0] >= '0' && name[0] <= '9')) return false;
  return std::all_of(name.begin(), name.end(), [colons](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           (colons && c == ':');
  });
}

void append_escaped(std::string& out, std::string_view text, bool quotes) {
  for (const char c : text) {
    if (c == '\\') {
      out += "\\\\";
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '"' && quotes) {
      out += "\\\"";
    } else {
      out += c;
    }
  }
}

// Infinities and NaN as the format wants them; "1.0" for a whole bound, as the reference Python client writes it,
// because queries compare `le` as a string.
std::string format_number(double value, bool keep_point) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  std::string text = fmt::format("{}", value);
  const bool plain = text.find_first_of(".e") == std::string::npos;
  return keep_point && plain ? text + ".0" : text;
}

// "{a="1",b="2"}" with an optional last label; empty without labels.
std::string format_labels(const MetricLabels& labels, std::string_view extra_name = {}, std::string_view extra = {}) {
  if (labels.empty() && extra_name.empty()) return "";
  std::string out = "{";
  const auto append = [&out](std::string_view name, std::string_view value) {
    if (out.size() > 1) out += ',';
    out += name;
    out += "=\"";
    append_escaped(out, value, /*quotes=*/true);
    out += '"';
  };
  for (const auto& [name, value] : labels) append(name, value);
  if (!extra_name.empty()) append(extra_name, extra);
  out += '}';
  return out;
}

void append_sample(std::string& out, std::string_view name, std::string_view suffix, std::string_view labels,
                   std::string_view value) {
  out += name;
  out += suffix;
  out += labels;
  out += ' ';
  out += value;
  out += '\n';
}

constexpr std::array kTimeToFirstToken = {.001, .005, .01, .02, .04, .06, .08,  .1,   .25,  .5,    .75,
                                          1.0,  2.5,  5.0, 7.5, 10., 20., 40.0, 80.0, 160., 640.0, 2560.};
constexpr std::array kInterToken = {.01, .025, .05, .075, .1,  .15, .2,   .3,   .4, .5,
                                    .75, 1.0,  2.5, 5.0,  7.5, 10., 20.0, 40.0, 80.};
constexpr std::array kRequestLatency = {.3,  .5,  .8,  1.0, 1.5,  2.0,  2.5,  5.0,  10.,   15.,  20.,
                                        30., 40., 50., 60., 120., 240., 480., 960., 1920., 7680.};
constexpr std::array kIterationTokens = {1., 8., 16., 32., 64., 128., 256., 512., 1024., 2048., 4096., 8192., 16384.};
constexpr std::array kRequestN = {1., 2., 5., 10., 20.};

}  // namespace

Histogram::Histogram(std::vector<double> upper_bounds)
    : upper_bounds_(std::move(upper_bounds)), counts_(upper_bounds_.size() + 1) {
  CHECK(std::is_sorted(upper_bounds_.begin(), upper_bounds_.end(), std::less_equal<>()));
  CHECK(upper_bounds_.empty() || std::isfinite(upper_bounds_.back()));
}

void Histogram::observe_many(double value, uint64_t count) {
  // A bound is inclusive: the first one that is not less than the value.
  const auto bucket = std::lower_bound(upper_bounds_.begin(), upper_bounds_.end(), value) - upper_bounds_.begin();
  counts_[static_cast<size_t>(bucket)].fetch_add(count, std::memory_order_relaxed);
  sum_.fetch_add(value * static_cast<double>(count), std::memory_order_relaxed);
}

uint64_t Histogram::count() const {
  uint64_t total = 0;
  for (const std::atomic<uint64_t>& count : counts_) total += count.load(std::memory_order_relaxed);
  return total;
}

struct Registry::Family {
  Type type;
  std::string help;
  std::vector<double> upper_bounds;  // histograms only
  // Keyed by the rendered labels. Exactly one of the three maps is used.
  std::map<std::string, std::pair<MetricLabels, Counter>> counters;
  std::map<std::string, std::pair<MetricLabels, Gauge>> gauges;
  std::map<std::string, std::pair<MetricLabels, std::unique_ptr<Histogram>>> histograms;

  size_t num_series() const { return counters.size() + gauges.size() + histograms.size(); }
};

Registry::Registry() = default;
Registry::~Registry() = default;

Registry::Family& Registry::find_family(Type type, std::string_view name, std::string_view help) {
  CHECK(is_name(name, /*colons=*/true));
  const auto found = families_.find(name);
  if (found == families_.end()) {
    auto created = std::make_unique<Family>();
    created->type = type;
    created->help = help;
    return *families_.emplace(std::string(name), std::move(created)).first->second;
  }
  CHECK_EQ(found->second->type, type);
  CHECK_EQ(found->second->help, help);
  return *found->second;
}

namespace {

// Labels in one order, so that equal sets are one series; also refuses what the format cannot carry.
MetricLabels sort_labels(const MetricLabels& labels) {
  MetricLabels sorted = labels;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 0; i < sorted.size(); ++i) {
    CHECK(is_name(sorted[i].first, /*colons=*/false));
    if (i > 0) CHECK_NE(sorted[i - 1].first, sorted[i].first);
  }
  return sorted;
}

}  // namespace

Counter& Registry::counter(std::string_view name, std::string_view help, const MetricLabels& labels) {
  const std::lock_guard lock(mutex_);
  Family& family = find_family(Type::kCounter, name, help);
  const auto [entry, is_new] = family.counters.try_emplace(format_labels(sort_labels(labels)));
  if (is_new) entry->second.first = labels;
  CHECK_LE(family.num_series(), kMaxSeriesPerFamily);
  return entry->second.second;
}

Gauge& Registry::gauge(std::string_view name, std::string_view help, const MetricLabels& labels) {
  const std::lock_guard lock(mutex_);
  Family& family = find_family(Type::kGauge, name, help);
  const auto [entry, is_new] = family.gauges.try_emplace(format_labels(sort_labels(labels)));
  if (is_new) entry->second.first = labels;
  CHECK_LE(family.num_series(), kMaxSeriesPerFamily);
  return entry->second.second;
}

Histogram& Registry::histogram(std::string_view name, std::string_view help, std::span<const double> upper_bounds,
                               const MetricLabels& labels) {
  const std::lock_guard lock(mutex_);
  Family& family = find_family(Type::kHistogram, name, help);
  if (family.histograms.empty()) family.upper_bounds.assign(upper_bounds.begin(), upper_bounds.end());
  CHECK(std::equal(upper_bounds.begin(), upper_bounds.end(), family.upper_bounds.begin(), family.upper_bounds.end()));
  auto& entry = family.histograms[format_labels(sort_labels(labels))];
  if (!entry.second) entry = {labels, std::make_unique<Histogram>(family.upper_bounds)};
  CHECK_LE(family.num_series(), kMaxSeriesPerFamily);
  return *entry.second;
}

std::string Registry::expose() const {
  const std::lock_guard lock(mutex_);
  std::string out;
  for (const auto& [name, family] : families_) {
    out += fmt::format("# HELP {} ", name);
    append_escaped(out, family->help, /*quotes=*/false);
    constexpr std::array kTypeNames = {"counter", "gauge", "histogram"};
    out += fmt::format("\n# TYPE {} {}\n", name, kTypeNames[static_cast<size_t>(family->type)]);
    for (const auto& [key, series] : family->counters) {
      append_sample(out, name, "", format_labels(series.first), std::to_string(series.second.value()));
    }
    for (const auto& [key, series] : family->gauges) {
      append_sample(out, name, "", format_labels(series.first), format_number(series.second.value(), false));
    }
    for (const auto& [key, series] : family->histograms) {
      // _count is the sum of the counts read here, so that one scrape is consistent while others observe.
      const Histogram& histogram = *series.second;
      uint64_t total = 0;
      for (size_t i = 0; i <= histogram.upper_bounds().size(); ++i) {
        total += histogram.bucket_count(i);
        const std::string bound =
            i < histogram.upper_bounds().size() ? format_number(histogram.upper_bounds()[i], true) : "+Inf";
        append_sample(out, name, "_bucket", format_labels(series.first, "le", bound), std::to_string(total));
      }
      const std::string labels = format_labels(series.first);
      append_sample(out, name, "_sum", labels, format_number(histogram.sum(), false));
      append_sample(out, name, "_count", labels, std::to_string(total));
    }
  }
  return out;
}

std::vector<double> one_two_five_buckets(double max_value) {
  std::vector<double> bounds;
  for (double decade = 1; decade <= max_value; decade *= 10) {
    for (const double mantissa : {1.0, 2.0, 5.0}) {
      if (mantissa * decade <= max_value) bounds.push_back(mantissa * decade);
    }
  }
  return bounds;
}

std::vector<double> linear_buckets(double start, double width, size_t count) {
  std::vector<double> bounds;
  for (size_t i = 0; i < count; ++i) bounds.push_back(start + width * static_cast<double>(i));
  return bounds;
}

std::span<const double> time_to_first_token_buckets() { return kTimeToFirstToken; }
std::span<const double> inter_token_buckets() { return kInterToken; }
std::span<const double> request_latency_buckets() { return kRequestLatency; }
std::span<const double> iteration_token_buckets() { return kIterationTokens; }
std::span<const double> request_n_buckets() { return kRequestN; }

}  // namespace tandem
