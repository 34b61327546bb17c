local function sieve(limit)
  local composite = {}
  local primes = {}
  for n = 2, limit do
    if not composite[n] then
      table.insert(primes, n)
      for multiple = n * n, limit, n do
        composite[multiple] = true
      end
    end
  end
  return primes
end

local primes = sieve(100)
print(#primes .. " primes up to 100")

-- Twin primes are two apart.
for i = 2, #primes do
  if primes[i] - primes[i - 1] == 2 then
    io.write("(", primes[i - 1], ", ", primes[i], ") ")
  end
end
io.write("\n")
