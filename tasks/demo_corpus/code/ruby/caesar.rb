module Caesar
  LOWER = ('a'..'z').to_a
  UPPER = ('A'..'Z').to_a

  def self.shift(text, by)
    from = (LOWER + UPPER).join
    to = (LOWER.rotate(by) + UPPER.rotate(by)).join
    text.tr(from, to)
  end

  def self.unshift(text, by)
    shift(text, -by)
  end
end

secret = Caesar.shift('Meet me at the old bridge', 5)
puts secret
puts Caesar.unshift(secret, 5)
