class WaitingQueue
  class Empty < StandardError; end

  def initialize(*names)
    @names = names
  end

  def join(name)
    @names.push(name) unless @names.include?(name)
    position(name)
  end

  def serve
    raise Empty, 'nobody is waiting' if @names.empty?

    @names.shift
  end

  def position(name)
    index = @names.index(name)
    index && index + 1
  end
end

queue = WaitingQueue.new('Paula', 'Omar')
puts queue.join('Kenji')
queue.serve
puts queue.position('Kenji')
