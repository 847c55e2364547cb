// Adding, removing and listing workers over HTTP while the router runs.
//
//   GET    /workers        {"workers":[{"id":0,"url":…,"role":"decode","state":"serving",…}]}
//   POST   /workers        {"url":"http://10.0.0.1:8200","role":"decode","weight":1} -> 201 and the worker
//   DELETE /workers/{id}   -> 202; the worker gets no new requests and is "removed" once those it has are done
#pragma once

#include <string>

#include "src/api/http_server.h"
#include "src/router/routed_worker.h"

namespace tandem::router {

// `key` is not empty; requests must present it as their bearer token. Both references must outlive the server.
void add_admin_routes(api::HttpServer& server, RoutedWorker& router, const std::string& key);

}  // namespace tandem::router
