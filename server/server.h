// The whole server put together: what is made in which order, and how it ends.
#pragma once

#include "server/options.h"

namespace espalier {

// Serves until SIGTERM or SIGINT, drains, and returns the process's exit status: 0 after a drain, 1
// if the model cannot be served or the device was lost (one line on standard error says why). A
// second signal ends the process at once. To be called before any thread is started.
int RunServer(const ServerOptions& options);

}  // namespace espalier
