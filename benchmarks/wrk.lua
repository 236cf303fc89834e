-- For wrk: prints what it measured as JSON. With the argument "numbered" each request has one header line more, which
-- differs from that of all others.

function init(arguments)
   if arguments[1] == "numbered" then
      local head, count = wrk.format():sub(1, -3) .. "X-Request-Id: ", 0     -- without the empty line
      function request()
         count = count + 1
         return head .. string.format("%016x\r\n\r\n", count)
      end
   end
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format('{"requests": %d, "seconds": %f, "p50_us": %f, "p99_us": %f, "errors": %d}\n',
                          summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
                          errors.connect + errors.read + errors.write + errors.timeout + errors.status))
end
