# Remember the results of slow methods.
module Memo
  def memoize(name)
    original = instance_method(name)
    cache = {}
    define_method(name) do |*args|
      cache.fetch(args) { cache[args] = original.bind(self).call(*args) }
    end
  end
end

class Stairs
  extend Memo

  # Ways to climb the stairs with steps of one or two.
  def ways(steps)
    return 1 if steps < 2

    ways(steps - 1) + ways(steps - 2)
  end
  memoize :ways
end

puts Stairs.new.ways(60)
