require 'date'

def weekend?(day)
  day.saturday? || day.sunday?
end

# Adds a number of working days and skips the weekends.
def add_working_days(start, count)
  day = start
  while count.positive?
    day += 1
    count -= 1 unless weekend?(day)
  end
  day
end

order = Date.new(2024, 8, 1)
arrival = add_working_days(order, 5)

puts "Ordered: #{order.strftime('%a %d %b')}"
puts "Arrives: #{arrival.strftime('%a %d %b')}"
